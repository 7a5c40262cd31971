#!/usr/bin/env bash
# The data stages as a user meets them, on a tiny model: shards and killed runs give the bytes of one run; parts, the control, explanations
# and training rows; documents of every bad kind, a full disk, two runs into one directory.
#
#     tests/data_test.sh             three kills
#     KILLS=20 tests/data_test.sh    the long form
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NLA=${NLA:-./nla}
KILLS=${KILLS:-3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
model=tests/golden/pair_llama/av

ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    printf 'FAILED: %s\n' "$*"
}
same() { if diff -r "$1" "$2" >"$work/diff" 2>&1; then ok; else bad "$3: $(head -3 "$work/diff")"; fi; }
says() { # says STATUS WORDS COMMAND...: exit status, and words on stdout or stderr
    local status=$1 words=$2 got
    shift 2
    "$@" >"$work/out" 2>&1 </dev/null
    got=$?
    if [ "$got" != "$status" ]; then
        bad "exit $got, expected $status: $*: $(cat "$work/out")"
    elif ! grep -qF -- "$words" "$work/out"; then
        bad "no '$words': $*: $(cat "$work/out")"
    else
        ok
    fi
}
equal() { if [ "$1" = "$2" ]; then ok; else bad "$3: '$1' instead of '$2'"; fi; }

awk 'BEGIN { srand(7); n = split("bread water letter storm king river price engine friend garden \"We will go,\" said the old captain at last", w, " ")
    for (i = 0; i < 400; i++) { printf "{\"doc_id\": \"doc%d\", \"text\": \"", i; for (j = 0; j < 160 + int(rand() * 160); j++) { x = w[1 + int(rand() * n)]; gsub(/"/, "\\\"", x); printf "%s%s", j ? " " : "", x }
        print "\"}" } }' >"$work/corpus.jsonl"
extract=("$NLA" data extract --model $model --layer 2 --in "$work/corpus.jsonl" --quiet --min-context 12 --positions-per-doc 4)

# One run, shards, killed runs, several layers, other threads: the same bytes.
says 0 "1600 rows" "${extract[@]}" --out "$work/one"
for range in 0:100 100:101 101:350 350:; do
    "${extract[@]}" --out "$work/shard-$range" --documents $range >/dev/null || bad "shard $range"
done
says 0 "1600 rows" "$NLA" data merge "$work"/shard-{0:100,100:101,101:350,350:} --out "$work/merged"
same "$work/one" "$work/merged" "four shards"
says 1 "name the shards in order" "$NLA" data merge "$work"/shard-{0:100,101:350} --out "$work/gap"
"${extract[@]}" --documents 100:101 --positions-per-doc 12 --out "$work/other" >/dev/null || bad "another shard"
says 1 "is '12', in the first shard '4'" "$NLA" data merge "$work/shard-0:100" "$work/other" --out "$work/gap"
if [ -e "$work/gap" ]; then bad "a merge that failed left something"; else ok; fi
"${extract[@]}" --layer 1,2 --threads 1 --out "$work/two" >/dev/null || bad "two layers"
cmp -s "$work/one/activations.safetensors" "$work/two/layer_2/activations.safetensors" && ok || bad "two layers in one pass"
cmp -s "$work/one/rows.jsonl" "$work/two/layer_1/rows.jsonl" && ok || bad "two layers hold the same rows"
kills=0
for try in $(seq 1 400); do
    [ $kills -lt "$KILLS" ] || break
    "${extract[@]}" --out "$work/killed" --save-every 0 $([ -d "$work/killed.partial" ] && echo --resume) >/dev/null 2>"$work/kill.err" &
    job=$!
    sleep "0.0$((RANDOM % 10))$((RANDOM % 10))"
    kill -KILL $job 2>/dev/null && kills=$((kills + 1))
    wait $job 2>/dev/null
    if [ -d "$work/killed" ]; then
        same "$work/one" "$work/killed" "after kills"
        rm -rf "$work/killed"
    fi
done
if [ ! -d "$work/killed" ]; then "${extract[@]}" --out "$work/killed" $([ -e "$work/killed.partial/state.json" ] && echo --resume) >/dev/null || bad "resume"; fi
same "$work/one" "$work/killed" "after $kills kills"
says 1 "exists; remove it" "${extract[@]}" --out "$work/killed"
if [ -e "$work/killed.partial" ]; then bad "OUT.partial is left"; else ok; fi

# An unfinished run: said, protected from other settings and from a second run.
"${extract[@]}" --out "$work/again" --save-every 0 >/dev/null & job=$!
while [ ! -e "$work/again.partial/state.json" ] && kill -0 $job 2>/dev/null; do :; done
kill -STOP $job
if [ -d "$work/again" ]; then
    echo "      (the run ended before it could be stopped: two runs into one directory not tried)"
else
    says 1 "another run is writing" "${extract[@]}" --out "$work/again"
    kill -KILL $job
    wait $job 2>/dev/null
    says 1 "holds an unfinished run" "${extract[@]}" --out "$work/again"
    says 1 "Remove it or use those settings" "${extract[@]}" --out "$work/again" --resume --seed 1
    truncate -s 0 "$work/again.partial/data/rows.jsonl"
    says 1 "shorter than what was recorded" "${extract[@]}" --out "$work/again" --resume
    printf '{"settings": 3}' >"$work/again.partial/state.json"
    says 1 "damaged" "${extract[@]}" --out "$work/again" --resume
fi
kill -KILL $job 2>/dev/null
says 1 "exists; remove it" "${extract[@]}" --out "$work/one"

# Documents of every kind.
{
    echo '{"doc_id": "empty", "text": ""}'
    echo '{"doc_id": "short", "text": "Three words only."}'
    printf '{"doc_id": "special", "text": "%s"}\n' "$(yes '<|im_end|>' | head -60 | tr -d '\n')"
    sed -n 5p "$work/corpus.jsonl"
    sed -n 5p "$work/corpus.jsonl"
    printf '{"doc_id": "long", "text": "'
    yes 'bread water letter storm ' | head -c 10000000 | tr -d '\n'
    echo '"}'
} >"$work/odd.jsonl"
says 0 "8 rows of 6 documents; 3 too short (no token behind the first 12), 1 with an id that came before" "$NLA" data extract \
    --model $model --layer 2 --in "$work/odd.jsonl" --min-context 12 --positions-per-doc 4 --max-length 64 --out "$work/odd"
printf '{"text": "bread \xff"}\n' >"$work/utf8.jsonl"
says 1 "utf8.jsonl: line 1: invalid JSON at column 17: a string is not valid UTF-8" "$NLA" data extract --model $model --in "$work/utf8.jsonl" --out "$work/none"
printf 'bread \xff\xfe water %s' "$(yes letter | head -40 | tr '\n' ' ')" >"$work/utf8.txt"
says 0 "10 rows" "$NLA" data extract --model $model --in "$work/utf8.txt" --min-context 12 --out "$work/utf8"
says 1 "no row: every document" "$NLA" data extract --model $model --layer 2 --in "$work/odd.jsonl" --documents 0:2 --out "$work/none"
says 1 "no document in the range 90:95" "$NLA" data extract --model $model --layer 2 --in "$work/odd.jsonl" --documents 90:95 --out "$work/none"
says 1 "--documents takes" "${extract[@]}" --documents 5:5 --out "$work/none"
says 1 "--documents takes" "${extract[@]}" --documents x --out "$work/none"
(
    trap '' XFSZ
    ulimit -f 200
    exec "${extract[@]}" --out "$work/full" --save-every 0
) >"$work/out" 2>&1
if [ $? = 1 ] && grep -q "cannot write" "$work/out" && [ ! -e "$work/full" ]; then ok; else bad "full disk: $(cat "$work/out")"; fi
"${extract[@]}" --out "$work/full" --resume >/dev/null 2>"$work/out" || "${extract[@]}" --out "$work/full" >/dev/null || bad "after a full disk: $(cat "$work/out")"
same "$work/one" "$work/full" "when there was room again"

# Parts, the control, statistics.
says 0 "held: " "$NLA" data split --acts "$work/one" --out "$work/parts" --parts av_sft:25,ar_sft:25,rl:50,held:10
sum=$(cat "$work"/parts/*/rows.jsonl | wc -l)
equal "$sum" 1600 "rows of all parts"
says 0 "rl: 0 documents, 0 prefixes" bash -c "'$NLA' data stats '$work'/parts/* | sed -n 's/^leakage between .*av_sft and .*\(rl: .*\)/\1/p'"
equal "$("$NLA" data stats "$work"/parts/* | grep -c '^leakage')" 6 "pairs of parts"
equal "$("$NLA" data stats "$work"/parts/* | grep '^leakage' | grep -cv ': 0 documents')" 0 "shared documents"
says 0 '"shared_documents": 400' "$NLA" data stats --json "$work/one" "$work/merged"
cat "$work"/parts/*/rows.jsonl | sort >"$work/a"
sort "$work/one/rows.jsonl" >"$work/b"
same "$work/a" "$work/b" "every row in one part"
says 0 "1600 rows" "$NLA" data permute --acts "$work/one" --out "$work/permuted"
same "$work/one/rows.jsonl" "$work/permuted/rows.jsonl" "permuted rows keep their texts"
says 0 '"repeated_vectors": 0' "$NLA" data stats --json "$work/permuted"
cmp -s "$work/one/activations.safetensors" "$work/permuted/activations.safetensors" && bad "nothing was permuted" || ok
says 1 "--parts takes names and weights" "$NLA" data split --acts "$work/one" --out "$work/p" --parts a:1,b
says 1 "names 'a' twice" "$NLA" data split --acts "$work/one" --out "$work/p" --parts a:1,a:2
says 1 "exists already" "$NLA" data split --acts "$work/one" --out "$work/parts"

# Explanations, four ways to one file; training rows.
says 0 "rows explained" "$NLA" data explain --acts "$work/parts/av_sft" --by rules --out "$work/rules.jsonl" --quiet
n=$(wc -l <"$work/parts/av_sft/rows.jsonl")
equal "$(wc -l <"$work/rules.jsonl")" "$n" "a line for every row"
head -n 20 "$work/rules.jsonl" >"$work/again.jsonl.part"
printf '{"row_id": "00' >>"$work/again.jsonl.part"
says 1 "of an unfinished run" "$NLA" data explain --acts "$work/parts/av_sft" --by rules --out "$work/again.jsonl"
says 0 "rows explained" "$NLA" data explain --acts "$work/parts/av_sft" --by rules --out "$work/again.jsonl" --resume
same "$work/rules.jsonl" "$work/again.jsonl" "explanations gone on with"
head -n 20 "$work/rules.jsonl" >"$work/x.jsonl.part"
says 1 "is not of row 0" "$NLA" data explain --acts "$work/parts/rl" --by rules --out "$work/x.jsonl" --resume
awk 'NR <= 6 { id = substr($0, 13, 16); why[1] = "<explanation>\\n- **First** thing said here.\\n- Second thing.\\n</explanation>"
    why[2] = "<explanation>One.\\n\\nTwo."; why[3] = "Only one paragraph of it."; why[4] = ""; why[5] = "# Heading\\n1. One\\n2) Two of `f(**x)` here"; why[6] = "One\\n\\n*Two* and _three_, a_b"
    printf "{\"row_id\": \"%s\", \"explanation\": \"%s\", \"by\": \"me\"}\n", id, why[NR] }' "$work/rules.jsonl" >"$work/mine.jsonl"
says 0 "3 rows explained" "$NLA" data explain --acts "$work/parts/av_sft" --by file --in "$work/mine.jsonl" --out "$work/cleaned.jsonl" --quiet
for why in "1: no closing tag" "1: fewer than two features" "1: empty" "$((n - 6)): nothing written for the row"; do
    if grep -qF "$why" "$work/out"; then ok; else bad "dropped: no '$why' in $(cat "$work/out")"; fi
done
equal "$(grep -c 'First thing said here.\\n\\nSecond thing."' "$work/cleaned.jsonl")" 1 "list marks, emphasis and tags taken off"
equal "$(grep -c '"One\\n\\nTwo and three, a_b"' "$work/cleaned.jsonl")" 1 "emphasis taken off, names kept"
equal "$(grep -c 'Heading One\\n\\nTwo of `f(\*\*x)` here"' "$work/cleaned.jsonl")" 1 "a heading joins what it heads; code stays"
says 0 "rows explained" "$NLA" data explain --acts "$work/parts/av_sft" --by model --model $model --rows 6 --max-tokens 12 --temperature 1 --batch 4 --out "$work/model.jsonl" --quiet
equal "$(wc -l <"$work/model.jsonl")" 6 "rows a model was asked about"
head -n 4 "$work/model.jsonl" >"$work/model2.jsonl.part"
"$NLA" data explain --acts "$work/parts/av_sft" --by model --model $model --rows 6 --max-tokens 12 --temperature 1 --batch 4 --out "$work/model2.jsonl" --quiet --resume >/dev/null || bad "resume by model"
same "$work/model.jsonl" "$work/model2.jsonl" "a model's explanations gone on with"
says 1 "row_id" "$NLA" data explain --acts "$work/parts/av_sft" --by file --in "$work/corpus.jsonl" --out "$work/x2.jsonl"
says 1 "takes file, model, api or rules" "$NLA" data explain --acts "$work/one" --by magic --out "$work/x3.jsonl"
says 1 "--in is needed" "$NLA" data explain --acts "$work/one" --by file --out "$work/x3.jsonl"

says 0 "3 rows" "$NLA" data build --acts "$work/parts/av_sft" --stage av_sft --explanations "$work/cleaned.jsonl" --out "$work/few" --quiet
told=$(grep -hv '"dropped"' "$work/cleaned.jsonl" "$work/rules.jsonl" | cut -c1-30 | sort -u | wc -l)
says 0 "$told rows" "$NLA" data build --acts "$work/parts/av_sft" --stage av_sft --explanations "$work/cleaned.jsonl,$work/rules.jsonl" --out "$work/av" --quiet
equal "$(grep -c 'First thing said here' "$work/av/rows.jsonl")" 1 "the first file's explanation counts"
equal "$(sed -n 's/^    rules: //p' "$work/av/nla_meta.yaml")" "$((told - 3))" "who wrote how many"
for key in injection_token_id injection_left_neighbor_id critic_suffix_ids "av: " "ar: " parent_datasets; do
    if grep -q "$key" "$work/av/nla_meta.yaml"; then ok; else bad "the sidecar lacks $key"; fi
done
says 0 "rows" "$NLA" data build --acts "$work/parts/rl" --stage rl --out "$work/rl" --quiet
says 1 "no row has an explanation" "$NLA" data build --acts "$work/parts/ar_sft" --stage ar_sft --out "$work/x4"
says 1 "takes av_sft, ar_sft or rl" "$NLA" data build --acts "$work/parts/rl" --stage sft --out "$work/x4"
says 0 "done after 2 steps" "$NLA" train av "out=$work/run" av=$model "data=$work/av" steps=2 batch=2
says 2 "data what?" "$NLA" data
says 2 "did you mean data split" "$NLA" data splt
says 0 "data extract" "$NLA" help data
says 0 "usage: nla data build" "$NLA" help data build

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
