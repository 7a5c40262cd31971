#!/usr/bin/env bash
# fuzz.sh [SECONDS] - builds the fuzz targets (tests/fuzz_NAME.c), runs each over its corpus (tests/corpus/NAME) and
# then over new inputs, SECONDS in all (default 600) shared among the targets. One line each, "ok ..." or "FAIL ...";
# exit status 1 when one failed. What it finds stays in build/fuzz: NAME.crash-* (or .leak-, .timeout-, .oom-) is an
# input that fails, NAME.corpus/ holds inputs that reach new code (add them to tests/corpus with libFuzzer's -merge=1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-600}
[[ $seconds =~ ^[0-9]+$ ]] || { echo "usage: tests/fuzz.sh [SECONDS]" >&2; exit 2; }
./build.sh fuzzers

export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1
targets=(tests/fuzz_*.c)
[ -f "${targets[0]}" ] || { echo "no tests/fuzz_*.c yet"; exit 0; }
each=$((seconds / ${#targets[@]}))
failed=0

run() { # run NAME WHAT libFuzzer's arguments
    local name=$1 what=$2 log=build/fuzz/$1.log
    shift 2
    if "build/fuzz/fuzz_$name" -timeout=10 -rss_limit_mb=2048 -max_len=65536 "-artifact_prefix=build/fuzz/$name." \
        "$@" >"$log" 2>&1; then
        echo "ok    fuzz $name: $what$(sed -nE 's/^Done ([0-9]+) runs.*/, \1 runs/p' "$log")"
    else
        tail -n 60 "$log"
        echo "FAIL  fuzz $name: $what (the input: build/fuzz/$name.*-*)"
        failed=1
    fi
}

for target in "${targets[@]}"; do
    name=$(basename "$target" .c)
    name=${name#fuzz_}
    seeds=(tests/corpus/"$name"/*)
    if [ -f "${seeds[0]}" ]; then run "$name" "${#seeds[@]} inputs of its corpus" "${seeds[@]}"; else seeds=(); fi
    if [ "$each" -gt 0 ]; then
        mkdir -p "build/fuzz/$name.corpus"
        run "$name" "$each s of new inputs" -max_total_time="$each" "build/fuzz/$name.corpus" \
            ${seeds[@]:+"tests/corpus/$name"}
    fi
done
exit $failed
