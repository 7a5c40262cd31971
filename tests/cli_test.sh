#!/usr/bin/env bash
# The command line as a user meets it: wrong arguments and broken files give one line on stderr and exit status 1 or 2,
# never a crash; the commands do what they say on a tiny model. NLA is the binary under test (build.sh gives the sanitized one).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NLA=${NLA:-./nla}
here=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

skip() {
    skipped=$((skipped + 1))
    printf 'skipped: %s\n' "$*"
}
ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    printf 'FAILED: %s\n' "$*"
}

# says STATUS WORDS COMMAND...: exit status, and one line on stderr that holds WORDS.
says() {
    local status=$1 words=$2 got
    shift 2
    "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    if [ "$got" != "$status" ]; then
        bad "exit $got, expected $status: ${*:0:9}"
        cat "$work/err"
    elif ! grep -qF -- "$words" "$work/err"; then
        bad "stderr lacks '$words': $*: $(cat "$work/err")"
    elif [ "$(wc -l <"$work/err")" != 1 ] || ! grep -q '^nla: error: ' "$work/err"; then
        bad "not one error line: $*: $(cat "$work/err")"
    else
        ok
    fi
}

# prints WORDS COMMAND...: exit 0, and stdout holds WORDS.
prints() {
    local words=$1
    shift
    if ! "$@" >"$work/out" 2>"$work/err" </dev/null; then
        bad "failed: $*: $(cat "$work/err")"
    elif ! grep -qF -- "$words" "$work/out"; then
        bad "stdout lacks '$words': $*: $(head -c 300 "$work/out")"
    else
        ok
    fi
}

same() { # same FILE FILE WHAT
    if cmp -s "$1" "$2"; then ok; else bad "$3: $1 and $2 differ"; fi
}

# A fresh copy of the tiny model, to spoil.
tiny() {
    rm -rf "$work/m"
    mkdir "$work/m"
    cp tests/golden/llama3/{config.json,model.safetensors} tests/golden/tiny_tokenizer/*.json "$work/m"
}
tiny
cp -r "$work/m" "$work/good"
good=$work/good m=$work/m

# ---------------------------------------------------------------------------------------------- wrong usage: exit 2
says 2 "there is no command 'genrate' (did you mean generate?)" "$NLA" genrate
says 2 "there is no command 'fly'" "$NLA" fly
says 2 "unknown option --modle (did you mean --model?)" "$NLA" generate --modle x y
says 2 "unknown option -m" "$NLA" generate -m x
says 1 "--weights takes int8 or fp8, not 'int4'" "$NLA" generate --model x --weights int4 hello
says 1 "training needs them as they are stored" "$NLA" train av "out=$work/x" av=y data=z --weights int8
says 2 "--model needs a value" "$NLA" generate hello --model
says 2 "--max-tokens takes a whole number" "$NLA" generate --max-tokens many x
says 2 "--max-tokens takes a whole number" "$NLA" generate --max-tokens 1.5 x
says 2 "--max-tokens takes a whole number" "$NLA" generate --max-tokens=0 x
says 2 "--temperature takes a number" "$NLA" generate --temperature -1 x
says 2 "--temperature takes a number" "$NLA" generate --temperature nan x
says 2 "--top-p takes a number" "$NLA" generate --top-p 1.5 x
says 2 "--seed takes a whole number" "$NLA" generate --seed 99999999999999999999 x
says 2 "--chat takes no value" "$NLA" generate --chat=yes x
says 2 "an argument is missing" "$NLA" inspect
says 2 "too many arguments" "$NLA" generate --model "$good" one two

# ---------------------------------------------------------------------------------------------- what cannot work: exit 1
says 1 "--model is needed" "$NLA" generate x
says 1 "--in is needed" "$NLA" capture --model "$good" --out "$work/x"
says 1 "--out is needed" "$NLA" dump --model "$good" x
says 1 "$work/none/config.json" "$NLA" generate --quiet --model "$work/none" x
says 1 "--device takes cpu or cuda" "$NLA" generate --quiet --device tpu --model "$good" x
says 1 "--layer 3: the model has layers 0 to 2" "$NLA" capture --quiet --model "$good" --layer 3 --in README.md --out "$work/x"
says 1 "--layer takes a layer" "$NLA" capture --quiet --model "$good" --layer top --in README.md --out "$work/x"
says 1 "--layer names layer 1 twice" "$NLA" capture --quiet --model "$good" --layer 1,1 --in README.md --out "$work/x"
says 1 "--positions takes all, last" "$NLA" capture --quiet --model "$good" --positions some --in README.md --out "$work/x"
says 1 "$work/none.txt" "$NLA" capture --quiet --model "$good" --in "$work/none.txt" --out "$work/x"
[ ! -e "$work/x" ] && [ -z "$(ls -d "$work"/x* 2>/dev/null)" ] && ok || bad "a failed capture left something behind"
says 1 "--ids takes token ids" "$NLA" dump --quiet --model "$good" --ids 1,two --out "$work/x"
says 1 "token id 999 is outside the vocabulary" "$NLA" dump --quiet --model "$good" --ids 1,999 --out "$work/x"
says 1 "the text is empty" "$NLA" generate --quiet --model "$good" ""
says 1 "/nowhere/x" "$NLA" dump --quiet --model "$good" --ids 1,2 --out /nowhere/x
says 1 "bench measures" "$NLA" bench speed
says 1 "--shape ROWS,IN,OUT" "$NLA" bench linear --shape 5
says 1 "'decode' is one too many" "$NLA" bench linear decode
says 1 "--shape is needed" "$NLA" bench --ops
says 1 "--shape is needed" "$NLA" bench --e2e
says 1 "ask for one" "$NLA" bench --ops --e2e --shape smollm2-135m
says 1 "--shape gpt-5: known are qwen2.5-7b, " "$NLA" bench --ops --shape gpt-5
says 1 "$work/none/config.json" "$NLA" bench --e2e --shape "$work/none"
says 1 "bench --e2e measures av, ar, decode, explain, rl" "$NLA" bench --e2e --shape smollm2-135m sft
says 1 "no setting 'bach'" "$NLA" bench --e2e --shape smollm2-135m bach=3
says 1 "lr is a number" "$NLA" bench --e2e --shape smollm2-135m lr=fast
says 1 "--av-tokens 100: with a prompt of 125" "$NLA" bench --e2e --shape smollm2-135m --av-tokens 100
says 1 "--ar-tokens 20: with its template" "$NLA" bench --e2e --shape smollm2-135m --ar-tokens 20
says 1 "a vocabulary of 151 is too small" "$NLA" bench --e2e --shape "$good"
says 1 "--shape llama-3.3-70b: rl needs " "$NLA" bench --e2e --device cpu --shape llama-3.3-70b rl
says 2 "--prompt-tokens takes a whole number from 32" "$NLA" bench --e2e --prompt-tokens 5
says 2 "--repeat takes a whole number" "$NLA" bench --ops --repeat 0
says 1 "there is no command 'x'" "$NLA" help x
says 1 "holds neither config.json" "$NLA" inspect tests

# ---------------------------------------------------------------------------------------------- broken files: exit 1
broken() { # broken WORDS: `generate` on the spoiled model, which is then made anew
    says 1 "$1" "$NLA" generate --quiet --model "$m" --max-tokens 3 "the other"
    tiny
}
truncate -s 0 "$m/config.json" && broken "config.json"
head -c 100 tests/golden/llama3/config.json >"$m/config.json" && broken "config.json"
echo '[1,2]' >"$m/config.json" && broken "not a JSON object"
sed -i 's/"llama"/"mamba"/' "$m/config.json" && broken "model_type is mamba"
sed -i 's/"hidden_size": 40/"hidden_size": 48/' "$m/config.json" && broken "config.json makes it ["
sed -i 's/"num_hidden_layers": 3/"num_hidden_layers": 4/' "$m/config.json" && broken "model.layers.3.input_layernorm.weight is missing"
sed -i 's/"num_hidden_layers": 3/"num_hidden_layers": 2/' "$m/config.json" && broken "model.layers.2."
sed -i 's/"num_hidden_layers": 3/"num_hidden_layers": 3, "num_hidden_layers": 3/' "$m/config.json" && broken "num_hidden_layers"
rm "$m/model.safetensors" && broken "model.safetensors"
truncate -s 0 "$m/model.safetensors" && broken "model.safetensors"
truncate -s 5 "$m/model.safetensors" && broken "model.safetensors"
truncate -s 3000 "$m/model.safetensors" && broken "model.safetensors"
truncate -s -1 "$m/model.safetensors" && broken "model.safetensors"
echo x >>"$m/model.safetensors" && broken "model.safetensors"
printf '\377\377\377\377\377\377\377\377' | dd of="$m/model.safetensors" conv=notrunc status=none && broken "model.safetensors"
rm "$m/model.safetensors" && mkdir "$m/model.safetensors" && broken "model.safetensors"
rm "$m/tokenizer.json" && broken "tokenizer.json"
echo '{}' >"$m/tokenizer.json" && broken "tokenizer.json"
head -c 500 tests/golden/tiny_tokenizer/tokenizer.json >"$m/tokenizer.json" && broken "tokenizer.json"
sed -i 's/"BPE"/"Unigram"/' "$m/tokenizer.json" && broken "tokenizer.json"
echo '{"eos_token_id": ' >"$m/generation_config.json" && broken "generation_config.json"
sed -i 's/im_start/turn/g' "$m/tokenizer_config.json"
says 1 "chat" "$NLA" generate --quiet --model "$m" --chat "the other"
tiny
printf '{"text": "ab"}\n{"text": 5}\n' >"$work/bad.jsonl"
says 1 "bad.jsonl" "$NLA" capture --quiet --model "$good" --in "$work/bad.jsonl" --out "$work/x"
printf '{"text": "ab"}\n{"txt": "cd"}\n' >"$work/bad.jsonl"
says 1 "bad.jsonl" "$NLA" capture --quiet --model "$good" --in "$work/bad.jsonl" --out "$work/x"
[ ! -e "$work/x" ] && ok || bad "a failed capture left a dataset"

# ---------------------------------------------------------------------------------------------- what works
prints "usage: nla COMMAND" "$NLA"
prints "usage: nla capture" "$NLA" help capture
prints "usage: nla capture" "$NLA" capture --help
prints "parameters" "$NLA" inspect "$good"
prints '"layers": 3' "$NLA" inspect --json "$good"
prints "model.embed_tokens.weight" "$NLA" inspect "$good/model.safetensors"
prints "[97, 102, 97]" "$NLA" tokenize --model "$good" --json "the othe"
prints "<|im_start|>" "$NLA" tokenize --model "$good" --chat "hi"
printf 'the\n\nin er\n' | "$NLA" tokenize --model "$good" --json >"$work/lines" && [ "$(wc -l <"$work/lines")" = 3 ] && ok ||
    bad "tokenize gives one array a line"

# greedy and sampled replies do not depend on threads or on what shares the batch
printf '{"text": "the other"}\n{"text": "in a thing"}\n{"text": "o"}\n' >"$work/prompts.jsonl"
reply() { "$NLA" generate --quiet --json --model "$good" --in "$work/prompts.jsonl" --max-tokens 12 --samples 3 --temperature 1 --seed 5 "$@"; }
reply >"$work/a" && reply --batch 1 --threads 1 >"$work/b" && same "$work/a" "$work/b" "batch of 1"
reply --batch 9 --threads 3 >"$work/b" && same "$work/a" "$work/b" "batch of 9"
reply --seed 6 >"$work/b" && ! cmp -s "$work/a" "$work/b" && ok || bad "another seed gives the same replies"
[ "$(grep -c '"row"' "$work/a")" = 9 ] && ok || bad "3 prompts x 3 samples are 9 replies"

# capture: one layer and several give the same rows; the dataset is complete
printf '{"doc_id": "a", "text": "the other thing"}\n{"doc_id": "b", "text": "in"}\n' >"$work/docs.jsonl"
"$NLA" capture --quiet --model "$good" --in "$work/docs.jsonl" --out "$work/one" --layer 1 &&
    "$NLA" capture --quiet --model "$good" --in "$work/docs.jsonl" --out "$work/all" --layer all --threads 1 &&
    same "$work/one/activations.safetensors" "$work/all/layer_1/activations.safetensors" "capture of one layer and of all"
same "$work/one/rows.jsonl" "$work/all/layer_0/rows.jsonl" "rows of two layers"
prints "row_count" "$NLA" inspect "$work/one"
rows=$(wc -l <"$work/one/rows.jsonl")
grep -q "row_count: $rows" "$work/one/nla_meta.yaml" && ok || bad "row_count is not the number of rows, $rows"
says 1 "$work/one" "$NLA" capture --quiet --model "$good" --in "$work/docs.jsonl" --out "$work/one" --layer 1
prints '"rows": 2' "$NLA" capture --quiet --json --model "$good" --in "$work/docs.jsonl" --out "$work/last" --positions last
"$NLA" capture --quiet --model "$good" --in - --out "$work/piped" --layer 1 <"$work/docs.jsonl" &&
    same "$work/one/activations.safetensors" "$work/piped/activations.safetensors" "capture from a pipe"
! grep -q "weights:" "$work/one/nla_meta.yaml" && ok || bad "weights as they are stored are noted"
"$NLA" capture --quiet --weights int8 --model "$good" --in "$work/docs.jsonl" --out "$work/rounded" --layer 1 || bad "capture --weights int8"
prints 'weights: "int8"' "$NLA" inspect "$work/rounded"
gzip -c "$work/docs.jsonl" >"$work/docs.jsonl.gz"
"$NLA" capture --quiet --model "$good" --in "$work/docs.jsonl.gz" --out "$work/zipped" --layer 1 &&
    same "$work/one/activations.safetensors" "$work/zipped/activations.safetensors" "capture of a gzipped file"

# the method: starts from a target, words from vectors, vectors from words, the round trip
target=tests/golden/pair_llama/av pair=tests/golden/pair_llama
printf '{"doc_id": "a", "text": "The river was wide."}\n{"doc_id": "b", "text": "It rained."}\n' >"$work/texts.jsonl"
prints '"layer": 2' "$NLA" capture --quiet --json --model "$target" --in "$work/texts.jsonl" --out "$work/acts" --layer 2
says 1 "--layer 4: the model has layers 0 to 3" "$NLA" init --quiet --model "$target" --layer 4 --av "$work/av" --injection-scale 5
says 1 "needs a length for the injected vector" "$NLA" init --quiet --model "$target" --layer 2 --av "$work/av"
says 1 "name what to make" "$NLA" init --quiet --model "$target" --layer 2
says 1 "no character is one rare token" "$NLA" init --quiet --model "$good" --layer 1 --ar "$work/av"
"$NLA" init --quiet --model "$target" --layer 2 --av "$work/av" --ar "$work/ar" --acts "$work/acts" && ok || bad "init fails"
says 1 "exists already" "$NLA" init --quiet --model "$target" --layer 2 --ar "$work/ar"
[ -L "$work/av/model.safetensors" ] && ok || bad "the AV start copies the weights"
prints '"layers": 3' "$NLA" inspect --json "$work/ar"
prints '"failed": ' "$NLA" verbalize --quiet --av "$work/av" --acts "$work/acts" --max-tokens 5 --samples 2
"$NLA" verbalize --quiet --av "$pair/av" --acts "$work/acts" --max-tokens 8 --samples 2 --temperature 1 --logprobs --out "$work/v1" &&
    "$NLA" verbalize --quiet --av "$pair/av" --acts "$work/acts" --max-tokens 8 --samples 2 --temperature 1 --logprobs --batch 2 --threads 1 \
        --out "$work/v2" && same "$work/v1" "$work/v2" "verbalize in other batches"
printf '{"explanation": "A text about a river.", "row": 0}\n{"explanation": null, "row": 1}\n{"explanation": "Rain.", "row": 2}\n' >"$work/e.jsonl"
prints '"texts": 2, "failed": 1' "$NLA" reconstruct --quiet --json --ar "$work/ar" --in "$work/e.jsonl" --out "$work/r.safetensors" --acts "$work/acts"
prints "activation_vector" "$NLA" inspect "$work/r.safetensors"
printf '{"words": 1}\n' >"$work/e.jsonl"
says 1 "line 1 has no explanation" "$NLA" reconstruct --quiet --ar "$work/ar" --in "$work/e.jsonl" --out "$work/r2.safetensors"
says 1 "vectors have width 40, the AV" "$NLA" verbalize --quiet --av tests/golden/pair_qwen3/av --acts "$work/acts"
says 1 "role is not av" "$NLA" verbalize --quiet --av "$pair/ar" --acts "$work/acts"
says 1 "nla_meta.yaml" "$NLA" verbalize --quiet --av "$good" --acts "$work/acts"
prints '"tokens": [' "$NLA" explain --quiet --json --model "$target" --av "$work/av" --ar "$work/ar" "The river was" --max-tokens 6 --layers 1,2
prints "failed (cut off" "$NLA" explain --quiet --model "$target" --av "$work/av" --ar "$work/ar" --positions 2:4 --html "$work/page.html" \
    "The river was" --max-tokens 6
grep -q '<html' "$work/page.html" && ok || bad "no page was written"
says 1 "--positions 7: the text has positions" "$NLA" explain --quiet --model "$target" --av "$work/av" --positions 7 "x"
says 1 "they were not made for this model" "$NLA" explain --quiet --model "$target" --av tests/golden/pair_qwen3/av "x"
prints '"conditions": {"explained": {' "$NLA" eval --quiet --json --av "$work/av" --ar "$work/ar" --acts "$work/acts" --max-tokens 5
prints '"what": "the AV' "$NLA" eval --quiet --json --av "$pair/av" --ar "$pair/ar" --acts "$work/acts" --max-tokens 5 --html "$work/eval.html"
grep -q '"position": \[[0-9]' "$work/out" && grep -q '"length": \[[0-9]' "$work/out" && grep -q '"mse": \[[0-9]' "$work/out" && ok ||
    bad "eval --json lacks its rows"
grep -q '<html' "$work/eval.html" && grep -q '"what": "the AV' "$work/eval.html" && ok || bad "eval wrote no page"
grep -q '"samples": \[{"row": [0-9]*, "prefix": "' "$work/out" && ! grep -q '"written"' "$work/out" && ok || bad "eval shows no rows, or texts nobody wrote"
cp -r "$work/acts" "$work/written" && sed -i 's/}$/, "explanation": "A river."}/' "$work/written/rows.jsonl"
prints '"written": {' "$NLA" eval --quiet --json --av "$pair/av" --ar "$pair/ar" --acts "$work/written" --max-tokens 5
says 1 "/nowhere/eval.html" "$NLA" eval --quiet --json --av "$pair/av" --ar "$pair/ar" --acts "$work/acts" --max-tokens 5 --html /nowhere/eval.html
grep -q '"conditions"' "$work/out" && ok || bad "eval loses its results when the page cannot be written"
mkdir "$work/run" && printf 'lr: 1e-5\n' >"$work/run/settings.yaml"
says 1 "$work/run/metrics.jsonl" "$NLA" report "$work/run"
printf '{"step": 1, "loss": 2.5}\n{"step": 1, "eval": {"fve": 0.1}, "samples": [{"row": 3, "explanation": "A river."}]}\n{"st' \
    >"$work/run/metrics.jsonl"
prints "$work/run/report.html" "$NLA" report "$work/run"
prints "$work/other.html" "$NLA" report "$work/run" --html "$work/other.html"
grep -q "<html" "$work/other.html" && ok || bad "report wrote no page where it was told to"
printf '\n{"step": 2}\n' >>"$work/run/metrics.jsonl"
says 1 "$work/run/metrics.jsonl, line 3: " "$NLA" report "$work/run"
says 2 "an argument is missing" "$NLA" report

# help: every command has all of it, in 80 columns; what it gives as examples works, one after the other
prints "usage: nla data build" "$NLA" help data build
prints "data stats" "$NLA" help data
commands=$("$NLA" help | sed -nE 's/^  ([a-z]+( [a-z]+)?) .*/\1/p')
[ "$(wc -l <<<"$commands")" -ge 20 ] && ok || bad "nla help lists $(wc -l <<<"$commands") commands"
while read -r name; do
    # shellcheck disable=SC2086 # a command may be two words
    "$NLA" help $name >"$work/help"
    grep -q "^usage: nla $name" "$work/help" && grep -q '^examples:' "$work/help" && ok || bad "nla help $name lacks its usage or examples"
    [ "$(sed '/^examples:/,$d' "$work/help" | wc -L)" -le 80 ] && ok || bad "nla help $name has a line of more than 80 columns"
done <<<"$commands"
box=$work/box
mkdir -p "$box/models" "$box/corpus" "$box/runs"
ln -s "$here/$target" "$box/models/smollm2"
printf '{"text": "The river was wide."}\n{"text": "It rained."}\n' >"$box/texts.jsonl"
for i in {0..19}; do
    printf '{"doc_id": "d%d", "text": "The river was wide and slow that day; %d boats lay at the shore, and it rained until the evening came over the hills and the fields."}\n' "$i" "$i"
done >"$box/corpus/corpus.jsonl"
nla() { "${exe:?}" "$@"; }
exe=$(realpath "$NLA")
while IFS= read -r line; do
    case $line in *"nla verify"* | *"--by api"* | *"man -l"*) continue ;; esac # a GPU, a server, man
    line=$(sed -E "s/--layer 20/--layer 2/; s/0:1000/0:10/; s/1000:2000/10:20/; s/steps=[0-9]+/steps=2/; s/checkpoint-[0-9]+/checkpoint-2/g
        s/nla data extract/& --min-context 3 --quiet/; s/nla train rl/& vectors=2 samples=2 max_tokens=4/; s/--shape [0-9,]+/--shape 8,8,8/" <<<"$line")
    if ! (cd "$box" && eval "$line") >"$work/out" 2>"$work/err" </dev/null; then bad "$line: $(cat "$work/err")"; else ok; fi
    case $line in
    *"nla init"*) rm -r "$box/av" "$box/ar" && cp -r "$pair/av" "$pair/ar" "$box" ;;                      # trained ones, which say something
    *"nla verbalize"*) printf '{"row": 0, "explanation": "A river."}\n' >>"$box/words.jsonl" ;;          # whatever they say
    esac
done < <(while read -r name; do
    # shellcheck disable=SC2086
    "$NLA" help $name | sed '1,/^examples:/d; s/^  //'
done <<<"$commands")

# the man page says the same, and groff has nothing to say about it
"$NLA" help --man >"$work/nla.1"
while read -r name; do
    grep -qFx ".SS nla $name" "$work/nla.1" && ok || bad "the man page lacks nla $name"
done <<<"$commands"
for words in '\fB\-\-injection\-scale \fIX\fR' '\fBlora_rank=\fIN\fR' '.SH ENVIRONMENT' '.SH EXIT STATUS' '    nla data merge shard0 shard1 \-\-out merged'; do
    grep -qFx -- "$words" "$work/nla.1" && ok || bad "the man page lacks the line $words"
done
if command -v groff >/dev/null; then
    groff -man -ww -z -Tutf8 "$work/nla.1" >"$work/out" 2>&1 && [ ! -s "$work/out" ] && ok || bad "groff: $(head -3 "$work/out")"
else
    skip "groff is not installed: the man page is not checked with it"
fi
if command -v man >/dev/null; then
    man --warnings -E UTF-8 -Tutf8 -l "$work/nla.1" >"$work/shown" 2>"$work/out" && [ ! -s "$work/out" ] && ok || bad "man: $(head -3 "$work/out")"
    grep -q 'wrong usage' "$work/shown" && ok || bad "man does not show the page"
else
    skip "man is not installed: the man page is not shown with it"
fi

# completion: what bash offers for a line of words, the last one begun; bash cuts a word at =
says 1 "--completion takes bash or zsh" "$NLA" help --completion fish
"$NLA" help --completion bash >"$work/nla.bash"
offers() { # offers 'WORD...' 'OFFERED...'
    local got
    got=$(
        cd "$box" || exit
        # shellcheck disable=SC1091
        . "$work/nla.bash"
        read -ra COMP_WORDS <<<"$1"
        [[ $1 != *' ' ]] || COMP_WORDS+=('')
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        COMPREPLY=()
        _nla 2>&1
        printf '%s\n' "${COMPREPLY[@]}" | sort -u | xargs
    )
    [ "$got" = "$2" ] && ok || bad "completion of '$1' offers '$got', not '$2'"
}
offers 'nla ex' 'explain export'
offers 'nla da' 'data'
offers 'nla data ' 'build explain extract merge permute split stats'
offers 'nla data e' 'explain extract'
offers 'nla help rec' 'reconstruct'
offers 'nla help data st' 'stats'
offers 'nla help --completion ' 'bash zsh'
offers 'nla generate --device ' 'cpu cuda'
offers 'nla generate --device = cu' 'cuda'
offers 'nla generate --max-tokens ' ''
offers 'nla generate --max' '--max-tokens'
offers 'nla data extract --po' '--positions-per-doc'
offers 'nla data extract --html' ''
offers 'nla data build --stage ' 'ar_sft av_sft rl'
offers 'nla capture --model mod' 'models'
offers 'nla capture --in tex' 'texts.jsonl'
offers 'nla capture --out tex' ''
offers 'nla inspect co' 'control corpus'
offers 'nla data stats parts ro' 'rows'
offers 'nla bench l' 'linear load'
offers 'nla train ' 'ar av rl'
offers 'nla train rl lor' 'lora_alpha= lora_modules= lora_rank= lora_rslora='
offers 'nla train av vec' ''
offers 'nla train rl vec' 'vectors='
offers 'nla train rl lr = 1e-4 moments = ' 'bf16 f32'
offers 'nla train rl lr = 1e-4 freeze_ar =' 'false true'
offers 'nla train rl out = run' 'runs'
offers 'nla train rl lr = ' ''
offers 'nla train rl --con' '--config'
offers 'nla nothing ' ''
"$NLA" help --completion zsh >"$work/_nla"
if command -v zsh >/dev/null; then
    timeout 120 zsh -f tests/zsh_completion.zsh "$work/_nla" "$box" >"$work/out" 2>&1 && ok || bad "completion in zsh: $(head -c 1000 "$work/out")"
else
    skip "zsh is not installed: its completion is not tried"
fi
# bench: every op is listed with its floor; whole steps run in memory that was planned
tiny_shape=tests/golden/pair_gemma3/av
"$NLA" bench --ops --device cpu --json --shape ./$tiny_shape --rows 160 --batch 5 --repeat 1 >"$work/ops" 2>"$work/err" || bad "bench --ops: $(cat "$work/err")"
for op in embed rmsnorm "linear q, k, v" rope_qkv attention gated add add_rmsnorm gather "linear lm_head" sample token_logprob token_logprob_backward \
    "linear_backward down" "weight_backward down" gated_backward rmsnorm_backward attention_backward rope_qkv_backward embed_backward scatter zero \
    "lora_up o" "lora_up_backward o" mse_nrm sum_squares "adamw, moments f32" "adamw, moments bf16"; do
    if grep -F "\"op\": \"$op\"" "$work/ops" | grep -q '"median_s": [0-9.e-]*, .*"share": [0-9.e-]*, "floor_s": [0-9.e-]*}'; then ok; else bad "bench --ops lacks $op"; fi
done
prints "rmsnorm_backward" "$NLA" bench --ops --device cpu --shape ./$tiny_shape --rows 160 --repeat 1 rmsnorm
! grep -q "linear" "$work/out" && ok || bad "bench --ops rmsnorm measures other ops"
tests/plans.sh "$NLA" cpu ./$tiny_shape >"$work/plans" && ok || bad "plans: $(cat "$work/plans")"

# dump names and a full pipe
"$NLA" dump --quiet --model "$good" --out "$work/d.safetensors" "the other" && prints "model.layers.2.self_attn" "$NLA" inspect "$work/d.safetensors"
"$NLA" help >/dev/full 2>"$work/err"
[ $? = 1 ] && grep -q "cannot write" "$work/err" && ok || bad "writing to a full device is not noticed"

printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
