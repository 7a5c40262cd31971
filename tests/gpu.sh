#!/usr/bin/env bash
# Everything that wants a GPU, in one command and under 8 minutes: built for the GPU's own architecture; parity with the CPU engine, op by
# op and whole models, fp32 and bf16, and with PyTorch when there is one; compute-sanitizer on small sizes; determinism; a short SFT and RL
# run; the bench last. Whole logs go to a folder.
#
#     tests/gpu.sh LOGDIR [MODEL]      MODEL: a model directory for parity and bench beside the tiny ones
#
# Ends with 'N passed, N failed'. It has never been run: the machine it was written on has no GPU (docs/gpu.md).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
logs=${1:?a folder for the logs}
model=${2:-}
mkdir -p "$logs"
NLA=${NLA:-$PWD/nla}
pair=tests/golden/pair_llama
passed=0 failed=0
export OMP_WAIT_POLICY=passive

step() { # step NAME COMMAND...: its output to LOGDIR/NAME.log
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$logs/$name.log" 2>&1; then
        passed=$((passed + 1))
        printf 'ok    %-34s %4d s\n' "$name" $((SECONDS - start))
    else
        failed=$((failed + 1))
        printf 'FAIL  %-34s %4d s  (%s)\n' "$name" $((SECONDS - start)) "$(tail -n 1 "$logs/$name.log" | cut -c1-100)"
    fi
}
nla() { "$NLA" "$@" --quiet; }
# within SECONDS: those, or what is left of 8 minutes less the last table's
within() { local left=$((480 - 45 - SECONDS)); echo $((left < 5 ? 5 : left < $1 ? left : $1)); }

nvidia-smi >"$logs/nvidia-smi.log" 2>&1 || { echo "gpu.sh: nvidia-smi finds no GPU: $(head -1 "$logs/nvidia-smi.log")"; exit 77; }
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d ' .')
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader

# 1. Build for this GPU alone.
step build env NLA_CUDA=1 NLA_ARCH="$arch" ./build.sh
[ $failed = 0 ] || exit 1

# 2. Parity: every op and whole models of every family, then the given one.
for mode in fp32 bf16; do
    flag=$([ $mode = fp32 ] && echo --fp32 || true)
    # shellcheck disable=SC2086 # maybe no word
    for family in llama qwen2 qwen3 gemma3; do
        step verify-$mode-$family "$NLA" verify $flag --model tests/golden/pair_$family/av
    done
    # shellcheck disable=SC2086
    [ -z "$model" ] || step verify-$mode-model "$NLA" verify $flag --model "$model"
done

# 3. PyTorch, when it is there: the same hidden states and logits as a model of transformers has.
python=${NLA_VENV:-$HOME/.cache/nla/venv}/bin/python
if [ -x "$python" ] && [ -n "$model" ]; then
    printf '#!/bin/sh\nexec "%s" "$@" --device cuda --fp32\n' "$NLA" >"$logs/nla-fp32"
    chmod +x "$logs/nla-fp32"
    step pytorch timeout 120 "$python" tests/parity.py --nla "$logs/nla-fp32" --models "$model"
fi

# 4. compute-sanitizer: what the shim cannot see (host pointers in kernels, tensor cores, the real order of threads).
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step sanitizer-$tool timeout "$(within 90)" compute-sanitizer --tool $tool --error-exitcode 9 "$NLA" verify --model tests/golden/pair_qwen3/av
    done
fi

# 5. Training on a tiny pair: CPU and GPU take the same step in fp32, two GPU runs give the same bits, losses fall.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk 'BEGIN { srand(1); n = split("bread water letter storm king river price engine friend garden", w, " ")
    for (i = 0; i < 64; i++) { printf "{\"id\": \"d%d\", \"text\": \"", i; for (j = 0; j < 24; j++) printf "%s%s", j ? " " : "", w[1 + int(rand() * n)]
        print "\"}" } }' >"$work/docs.jsonl"
nla capture --device cpu --model $pair/av --layer 2 --in "$work/docs.jsonl" --out "$work/acts" --positions 4
awk '{ t = $0; sub(/.*"text": "/, "", t); sub(/".*/, "", t); n = split(t, w, " "); sub(/}$/, "")
    print $0 ", \"explanation\": \"The text has come to " w[n] ".\\n\\nThe last word is " w[n] " and another must follow.\"}" }' \
    "$work/acts/rows.jsonl" >"$work/rows" && mv "$work/rows" "$work/acts/rows.jsonl"
train() { # train STAGE OUT STEPS MORE...
    local stage=$1 out=$2 steps=$3
    shift 3
    nla train "$stage" "out=$work/$out" av=$pair/av ar=$pair/ar "data=$work/acts" "steps=$steps" lr=2e-3 "$@" && cp "$work/$out/metrics.jsonl" "$logs/$out.jsonl"
}
rl=(vectors=4 samples=4 micro=2 max_tokens=24)
step train-av train av av 60 batch=16 micro=8
step train-ar train ar ar 60 batch=16 micro=8
step train-rl train rl rl 20 "${rl[@]}"
step train-rl-again train rl rl2 20 "${rl[@]}"
step two-runs-give-the-same-bits diff -r -x state.json -x nla_meta.yaml "$work/rl/checkpoint-20" "$work/rl2/checkpoint-20"
step rl-fp32-cpu train rl cpu 1 "${rl[@]}" --device cpu
step rl-fp32-cuda train rl cuda 1 "${rl[@]}" --fp32
first_last() { awk -v key="\"$2\": " '{ i = index($0, key); v = substr($0, i + length(key)); sub(/[,}].*/, "", v); if (NR == 1) a = v; b = v }
    END { print a, "->", b; exit !(b < a) }' "$work/$1/metrics.jsonl"; }
step av-loss-falls first_last av loss
step ar-loss-falls first_last ar loss
same_text() { # decoding with recorded steps and op by op
    local graphs
    for graphs in 1 0; do
        NLA_GRAPHS=$graphs nla generate --model $pair/av --ids 1,2,3 --samples 8 --temperature 1 --max-tokens 60 --json >"$work/said-$graphs" || return 1
    done
    cmp "$work/said-1" "$work/said-0"
}
step recorded-steps-say-the-same same_text
step the-same-rl-step awk -f tests/same_step.awk "$work/cpu/metrics.jsonl" "$work/cuda/metrics.jsonl"

# 6. Speed: whole steps with random weights (adapters, so that an 80 GB GPU has room for the 7B shape), then every op at that shape.
e2e() { timeout "$(within "$1")" "$NLA" bench --e2e --device cuda --shape "$2" --repeat 1 "${@:3}"; }
step bench-e2e-135m e2e 60 smollm2-135m batch=64 vectors=16
step bench-e2e-7b e2e 120 qwen2.5-7b batch=64 vectors=16 lora_rank=16
[ -z "$model" ] || step bench-model timeout "$(within 60)" "$NLA" bench all --device cuda --model "$model" --samples 64 --max-tokens 64
step bench-ops timeout 45 "$NLA" bench --ops --device cuda --shape qwen2.5-7b --batch 256 --repeat 20
cat "$logs"/bench-e2e-*.log "$logs/bench-ops.log"
printf '%d passed, %d failed in %d s; logs in %s\n' $passed $failed "$SECONDS" "$logs"
[ $failed = 0 ]
