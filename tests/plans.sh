#!/usr/bin/env bash
# The memory that a run plans is the memory that its engine takes, within 3%: every kind of step that `nla bench --e2e` makes, all weights
# and adapters, blocks kept and computed twice.
#
#     tests/plans.sh NLA DEVICE SHAPE [OPTION ...]
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nla=$1 device=$2 shape=$3
shift 3
sizes=(--prompt-tokens 40 --av-tokens 80 --ar-tokens 40 --text-tokens 20 --repeat 1 batch=6 micro=3 vectors=4 samples=3 max_tokens=16)
failed=0 out=$(mktemp)
for how in "" "moments=bf16 recompute=true" "lora_rank=4"; do
    # shellcheck disable=SC2086 # words wanted
    "$nla" bench --e2e --device "$device" --shape "$shape" --json --quiet "$@" "${sizes[@]}" $([ -z "$how" ] || echo av ar rl) $how >"$out" || failed=1
    awk -v how="${how:-all weights}" -v wanted=$([ -z "$how" ] && echo 5 || echo 3) '
        function number(key) { i = index($0, "\"" key "\": "); return substr($0, i + length(key) + 4) + 0 }
        /"planned_engine"/ { n++; part = $0; sub(/.*"part": "/, "", part); sub(/".*/, "", part)
            ratio = number("peak_engine") / number("planned_engine"); wrong = ratio < 0.97 || ratio > 1.03; bad += wrong
            printf "%-8s %-30s planned %9.0f took %9.0f (%+.2f%%)%s\n", part, how, number("planned_engine"), number("peak_engine"),
                100 * (ratio - 1), wrong ? " BEYOND 3%" : "" }
        END { exit bad || n != wanted }' "$out" || failed=1
done
rm -f "$out"
exit $failed
