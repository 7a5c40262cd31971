#!/usr/bin/env bash
# The CUDA engine without a GPU, as a user meets it (build/test/nla, whose kernels run in tests/cuda_shim.h): a whole RL step of every
# family equals the CPU engine's; and kernels with a bug put in (an off-by-one, a missing barrier, an uninitialised read, ...) are found.
#
#     tests/cuda_test.sh [NUMBER ...]      with numbers: only those of tests/mutants.py; with none: all but those
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SHIM=${SHIM:-build/test}
export NLA_SHIM=protect # the host may not touch device memory either
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    printf 'FAILED: %s\n' "$*"
}
nla() { nice -n 19 "$SHIM/nla" "$@" --quiet; }

if ! [ -f "$SHIM/kernels_shim.o" ]; then
    echo "no shim in $SHIM: ./build.sh unit makes it"
    exit 77
fi

# ---- an RL step: rollouts, rewards, reference, policy and AR updates, on both engines

documents() {
    awk 'BEGIN { srand(1); n = split("bread water letter storm king river price engine friend garden", w, " ")
        for (i = 0; i < 6; i++) { printf "{\"id\": \"d%d\", \"text\": \"", i; for (j = 0; j < 24; j++) printf "%s%s", j ? " " : "", w[1 + int(rand() * n)]
            print "\"}" } }'
}
rl_step() { # rl_step FAMILY LAYER: that its AV reads
    local pair=tests/golden/pair_$1 device
    documents >"$work/docs.jsonl"
    nla capture --device cpu --model "$pair/av" --layer "$2" --in "$work/docs.jsonl" --out "$work/$1" --positions 4 || { bad "$1: capture"; return; }
    # A short warm start: an AV whose explanations differ and sometimes fail, so that there are rewards and advantages.
    awk '{ t = $0; sub(/.*"text": "/, "", t); sub(/".*/, "", t); n = split(t, w, " "); sub(/}$/, "")
        print $0 ", \"explanation\": \"It is " w[n] ".\"}" }' "$work/$1/rows.jsonl" >"$work/rows" && mv "$work/rows" "$work/$1/rows.jsonl"
    nla train av --device cpu "out=$work/$1-av" "av=$pair/av" "data=$work/$1" steps=70 batch=12 micro=12 lr=4e-3 save_every=70 ||
        { bad "$1: train av"; return; }
    for device in cpu cuda; do
        nla train rl --device $device --fp32 --threads 1 "out=$work/$1-$device" "av=$work/$1-av/checkpoint-70/av" "ar=$pair/ar" \
            "data=$work/$1" steps=1 vectors=3 samples=4 micro=2 max_tokens=40 lr=1e-3 warmup=0 updates=2 ||
            { bad "$1: train rl on $device"; return; }
    done
    if awk -f tests/same_step.awk "$work/$1-cpu/metrics.jsonl" "$work/$1-cuda/metrics.jsonl"; then ok; else bad "$1: an RL step differs"; fi
    head -1 "$work/$1-cuda/metrics.jsonl" | cut -c1-230
}

# ---- mutants: one copy of kernels.cu with all of tests/mutants.py in it

build_mutants() {
    python3 tests/mutants.py "$work/kernels.cu" >"$work/mutants" || return 1
    ${CXX:-g++} -std=c++17 -O1 -fno-strict-aliasing -I. -DNLA_SHIM -DNLA_CUDA=1 -fsanitize=alignment,bounds,shift \
        -fsanitize-undefined-trap-on-error -x c++ -c "$work/kernels.cu" -o "$work/kernels.o" || return 1
    # shellcheck disable=SC2046 # words wanted
    ${CC:-gcc} -fopenmp $(ls "$SHIM"/*.o "$SHIM"/tests/test_kernels.o | grep -vE '/(nla|kernels|kernels_shim).o$') "$work/kernels.o" \
        -lpcre2-8 -lutf8proc -lyaml -lm -lstdc++ -lcriterion -o "$work/run"
}
run_mutant() { # run_mutant NUMBER SUITE: the exit status of the tests
    NLA_SHIM=1 NLA_MUTANT=$1 OMP_NUM_THREADS=1 nice -n 19 "$work/run" --jobs=1 --filter "$2*" >"$work/log" 2>&1
}
run_mutants() { # run_mutants [NUMBER ...]
    local number suite what
    if run_mutant 0 kernels/rmsnorm; then ok; else bad "without a mutant the kernels' tests fail"; fi
    while read -r number suite what; do
        if [ $# != 0 ] && ! grep -qw "$number" <<<"$*"; then continue; fi
        if run_mutant "$number" "$suite"; then
            bad "mutant $number was not caught: $what"
        elif grep -q 'Tested: 0' "$work/log"; then
            bad "mutant $number: no test is called $suite"
        else
            ok
            printf '%2d %s\n     %s\n' "$number" "$what" \
                "$(grep -m 1 -oE 'cuda shim: .*|op [a-z ]+[,:] .*|expression .*|fabsf.*' "$work/log" | cut -c1-120)"
        fi
    done <"$work/mutants"
}

if [ $# = 0 ] || [ "$1" = none ]; then
    for mode in "" --fp32; do
        # shellcheck disable=SC2086 # maybe no word
        if NLA_SHIM=1 nla verify $mode --model tests/golden/pair_gemma3/av >"$work/log"; then ok; else bad "nla verify $mode: $(grep BEYOND "$work/log")"; fi
    done
    if NLA_SHIM=1 nice -n 19 tests/plans.sh "$SHIM/nla" cuda ./tests/golden/pair_gemma3/av >"$work/log"; then ok; else bad "plans: $(cat "$work/log")"; fi
    rl_step llama 2
    rl_step qwen2 2
    rl_step qwen3 2
    rl_step gemma3 4
fi
if [ "${1:-}" = none ]; then :; elif build_mutants; then run_mutants "$@"; else bad "the mutants do not build"; fi
printf '%d passed, %d failed\n' $passed $failed
[ $failed = 0 ]
