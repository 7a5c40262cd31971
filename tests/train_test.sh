#!/usr/bin/env bash
# Training runs as a user meets them, on a tiny pair: the same bits on one thread or two, after SIGTERM and after SIGKILLs at random
# moments as without; damage, a full disk and wrong settings give one clear line and leave the last checkpoint as it was.
#
#     tests/train_test.sh             a few kills a stage
#     KILLS=20 tests/train_test.sh    the long form
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NLA=${NLA:-./nla}
KILLS=${KILLS:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
pair=tests/golden/pair_llama

ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    printf 'FAILED: %s\n' "$*"
}
same() { # same DIR DIR WHAT: the trained models and moments of two checkpoints, bit for bit
    if diff -r -x state.json -x nla_meta.yaml "$1" "$2" >"$work/diff"; then ok; else bad "$3: $(head -3 "$work/diff")"; fi
}
says() { # says STATUS WORDS COMMAND...
    local status=$1 words=$2 got
    shift 2
    "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    if [ "$got" != "$status" ]; then
        bad "exit $got, expected $status: $*: $(cat "$work/err")"
    elif ! grep -qF -- "$words" "$work/err"; then
        bad "stderr lacks '$words': $*: $(cat "$work/err")"
    else
        ok
    fi
}

# Rows: activations of the AV's own model, and explanations that say the text's last word.
awk 'BEGIN { srand(1); n = split("bread water letter storm king river price engine friend garden", w, " ")
    for (i = 0; i < 16; i++) { printf "{\"id\": \"d%d\", \"text\": \"", i; for (j = 0; j < 24; j++) printf "%s%s", j ? " " : "", w[1 + int(rand() * n)]
        print "\"}" } }' >"$work/docs.jsonl"
"$NLA" capture --model $pair/av --layer 2 --in "$work/docs.jsonl" --out "$work/acts" --positions 3 --quiet || bad "capture"
"$NLA" capture --model $pair/av --layer 1 --in "$work/docs.jsonl" --out "$work/other" --positions 3 --quiet || bad "capture"
for d in acts other; do
    awk '{ t = $0; sub(/.*"text": "/, "", t); sub(/".*/, "", t); n = split(t, w, " "); sub(/}$/, "")
        print $0 ", \"explanation\": \"The text has come to " w[n] ".\\n\\nThe last word is " w[n] " and another must follow.\"}" }' \
        "$work/$d/rows.jsonl" >"$work/rows" && mv "$work/rows" "$work/$d/rows.jsonl"
done

run() { # run STAGE OUT MORE...; start: the same in the background, its own process as $!
    arguments "$@"
    "$NLA" "${command[@]}"
}
start() {
    arguments "$@"
    "$NLA" "${command[@]}" &
}
arguments() {
    local stage=$1 out=$2
    shift 2
    # shellcheck disable=SC2206 # words wanted
    command=(train "$stage" "out=$work/$out" av=$pair/av ar=$pair/ar "data=$work/acts" steps=40 save_every=${EVERY:-4} lr=2e-3
        ${STAGE_SETTINGS:-} "$@" --quiet)
}
declare -A settings=([av]="batch=6 micro=4" [ar]="batch=6 micro=4" [rl]="vectors=4 samples=3 micro=3 max_tokens=24 updates=2")

for stage in av ar rl; do
    STAGE_SETTINGS=${settings[$stage]}
    run $stage "$stage-one" --threads 1 || bad "train $stage"
    run $stage "$stage-two" --threads 2 || bad "train $stage"
    same "$work/$stage-one/checkpoint-40" "$work/$stage-two/checkpoint-40" "$stage: one thread or two"

    # Interrupted politely: it saves, says so by exit 0, and goes on from there with nothing given but the directory.
    start $stage "$stage-term" --threads 2
    job=$!
    while [ ! -s "$work/$stage-term/metrics.jsonl" ] && kill -0 $job 2>/dev/null; do sleep 0.01; done
    kill -TERM $job 2>/dev/null
    if wait $job; then ok; else bad "$stage: exit status after SIGTERM"; fi
    [ -d "$work/$stage-term/checkpoint-40" ] || "$NLA" train $stage "out=$work/$stage-term" --resume --quiet || bad "resume $stage"
    same "$work/$stage-one/checkpoint-40" "$work/$stage-term/checkpoint-40" "$stage: after SIGTERM"

    # Killed at random moments until it is done; again, until there were enough of them.
    kills=0
    while :; do
        rm -rf "${work:?}/$stage-kill"
        resume="" tries=0
        while [ ! -d "$work/$stage-kill/checkpoint-40" ] && [ $tries -lt 200 ]; do
            tries=$((tries + 1))
            # shellcheck disable=SC2086 # maybe no word
            start $stage "$stage-kill" --threads 2 $resume 2>>"$work/kill.err"
            job=$!
            if [ $kills -lt "$KILLS" ]; then
                sleep "0.$((RANDOM % 3))$((RANDOM % 10))$((RANDOM % 10))"
                kill -KILL $job 2>/dev/null && kills=$((kills + 1))
            fi
            wait $job 2>/dev/null
            resume=""
            for d in "$work/$stage-kill"/checkpoint-*; do
                case $d in *.tmp | *'*') ;; *) resume=--resume ;; esac
            done
        done
        same "$work/$stage-one/checkpoint-40" "$work/$stage-kill/checkpoint-40" "$stage: after $kills kills"
        [ $kills -lt "$KILLS" ] || break
    done
    echo "$stage: killed $kills times"
    if [ "$(grep -c '"loss"\|"reward"' "$work/$stage-kill/metrics.jsonl")" = 40 ]; then ok; else bad "$stage: metrics after kills"; fi
    if "$NLA" report "$work/$stage-kill" --html "$work/$stage.html" --quiet >"$work/out" && [ -s "$work/$stage.html" ]; then ok; else bad "report $stage"; fi
done

# Only the newest checkpoints are kept; a flipped byte is found, and the one before is offered and good.
STAGE_SETTINGS=${settings[av]}
if [ "$(find "$work/av-one" -maxdepth 1 -name 'checkpoint-*' | wc -l)" = 2 ]; then ok; else bad "old checkpoints are left"; fi
printf '\x5a' | dd of="$work/av-two/checkpoint-40/av/model.safetensors" bs=1 seek=20000 conv=notrunc 2>/dev/null
says 1 "The one before, checkpoint-3" "$NLA" train av "out=$work/av-two" --resume steps=44
rm -r "$work/av-two/checkpoint-40"
says 0 "checkpoint-40: done" "$NLA" train av "out=$work/av-two" --resume
same "$work/av-one/checkpoint-40" "$work/av-two/checkpoint-40" "from the checkpoint before"

# A full disk (a limit on the size of files, which fails in the same way).
cp -r "$work/av-one" "$work/full"
(
    trap '' XFSZ
    ulimit -f 100
    exec "$NLA" train av "out=$work/full" --resume steps=48 --quiet
) >"$work/out" 2>"$work/err"
if [ $? = 1 ] && grep -q "cannot write\|too large" "$work/err" && [ ! -e "$work/full/checkpoint-44.tmp" ]; then ok; else bad "full disk: $(cat "$work/err")"; fi
same "$work/av-one/checkpoint-40" "$work/full/checkpoint-40" "after a full disk"

# Adapters: trained, opened by their directory, merged.
run av adapters lora_rank=4 lora_rslora=true lora_modules=q,v,down || bad "adapters"
says 0 "tokens drawn" "$NLA" verbalize --av "$work/adapters/checkpoint-40/av" --acts "$work/acts" --max-tokens 8 --out "$work/read.jsonl"
says 0 "" "$NLA" export "$work/adapters/checkpoint-40/av" --merge --dtype f32 --out "$work/merged"
says 0 "tokens drawn" "$NLA" verbalize --av "$work/merged" --acts "$work/acts" --max-tokens 8 --out "$work/merged.jsonl"
if cmp -s <(cut -d, -f1-6 "$work/read.jsonl") <(cut -d, -f1-6 "$work/merged.jsonl"); then ok; else bad "merged adapters read otherwise"; fi
ln -s "$PWD/$pair" "$work/pair"
says 0 "" "$NLA" export "$work/adapters/checkpoint-40/av" --dtype bf16 --base "../pair/av" --out "$work/narrow"
says 0 "tokens drawn" "$NLA" verbalize --av "$work/narrow" --acts "$work/acts" --max-tokens 8 --out "$work/narrow.jsonl"
grep -q '"\.\./pair/av"' "$work/narrow/adapter_config.json" && ok || bad "the adapters' base"
grep -qa '"dtype":"BF16"' "$work/narrow/adapter_model.safetensors" && ! grep -qa '"dtype":"F32"' "$work/narrow/adapter_model.safetensors" && ok || bad "the adapters are not bf16"
says 1 "no such directory" "$NLA" export "$work/adapters/checkpoint-40/av" --base nowhere --out "$work/nowhere"
says 1 "whole weights" "$NLA" export "$work/adapters/checkpoint-40/av" --merge --base "../pair/av" --out "$work/nowhere"
if [ ! -e "$work/nowhere" ]; then ok; else bad "a failed export left something"; fi
says 0 "" "$NLA" export "$work/ar-one/checkpoint-40/ar" --out "$work/ar-out"
says 0 "" "$NLA" reconstruct --ar "$work/ar-out" --in "$work/acts/rows.jsonl" --out "$work/vectors.safetensors"

# Wrong settings and data.
train=("$NLA" train av "out=$work/x" av=$pair/av)
says 1 "did you mean batch" "${train[@]}" "data=$work/acts" bach=3
says 1 "no setting 'vectors'" "${train[@]}" "data=$work/acts" vectors=3
says 1 "is not a setting" "${train[@]}" "data=$work/acts" twelve
says 1 "lr is a number" "${train[@]}" "data=$work/acts" lr=fast
says 1 "train av needs data=PATH" "${train[@]}"
says 1 "train takes av, ar or rl" "$NLA" train all
says 1 "captured at layer 1" "${train[@]}" "data=$work/other"
says 1 "holds checkpoints of a run" run av av-one
says 1 "no checkpoint to go on from" "$NLA" train av "out=$work/none" --resume av=$pair/av "data=$work/acts"
printf 'steps: 3\nlearning_rate: 1\n' >"$work/bad.yaml"
says 1 "no setting 'learning_rate'" "${train[@]}" "data=$work/acts" --config "$work/bad.yaml"
cp -r "$work/acts" "$work/nan"
printf '\0\0\xc0\x7f' | dd of="$work/nan/activations.safetensors" bs=1 seek=$((4096 + 40 * 4 * 5)) conv=notrunc 2>/dev/null
says 1 "is not finite" "${train[@]}" "data=$work/nan"
sed 's/, "explanation".*/}/' "$work/acts/rows.jsonl" >"$work/rows" && cp -r "$work/acts" "$work/silent" && mv "$work/rows" "$work/silent/rows.jsonl"
says 1 "no row with an explanation" "${train[@]}" "data=$work/silent"
says 1 "ten updates in a row were not finite" run av absurd lr=1e30 warmup=0
printf 'steps: 3\nbatch: 4\n' >"$work/good.yaml"
says 0 "done after 2 steps" "${train[@]}" "data=$work/acts" --config "$work/good.yaml" steps=2

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
