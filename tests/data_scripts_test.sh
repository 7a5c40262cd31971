#!/usr/bin/env bash
# data/explain_api.py against a server on 127.0.0.1 that plays both APIs and misbehaves, and data/parquet.py both ways:
# tests/data_scripts.py checks them on data sets that nla captures here. The Python with pyarrow is that of $NLA_VENV
# (tests/requirements.txt), or the small one that ./build.sh test makes and names so; where no Python has what a part needs, that part is skipped.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export NLA=${NLA:-./nla}
venv=${NLA_VENV:-$HOME/.cache/nla/venv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

python_with() { # python_with MODULE...: the first Python that has them all
    local python modules
    modules=$(printf ', %s' "$@")
    for python in "$venv/bin/python" python3 /usr/bin/python3; do
        if "$python" -c "import ${modules:2}" 2>/dev/null; then
            echo "$python"
            return 0
        fi
    done
    return 1
}

part() { # part NAME MODULE...
    local name=$1 python
    shift
    if ! python=$(python_with "$@"); then
        echo "skipped: $name: no Python with $*"
        skipped=$((skipped + 1))
        return
    fi
    "$python" tests/data_scripts.py "$name" "$work" | tee "$work/$name.log"
    if [[ $(tail -n 1 "$work/$name.log") =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]]; then
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2]))
    else
        echo "FAILED: $name ended without a summary"
        failed=$((failed + 1))
    fi
}

printf '{"doc_id": "a", "text": "The river was wide. \\u00dcn\\u00efcode \\u0007 \\t tab \\"q\\" \\\\ and \\ud83d\\udc1f fish"}
{"doc_id": "b", "text": "It rained."}\n{"doc_id": "again", "text": "It rained."}\n' >"$work/docs.jsonl"
if ! "$NLA" capture --quiet --model tests/golden/pair_llama/av --in "$work/docs.jsonl" --out "$work/acts" --layer 2; then
    echo "0 passed, 1 failed"
    exit 1
fi

# XXH3 as the C program has it, of each text of two known ones
cat >"$work/xxh3.c" <<'END_C'
#define XXH_INLINE_ALL
#include <xxhash.h>
#include <stdio.h>
#include <string.h>
int main(int n, char **text) {
    for (int i = 1; i < n; i++) printf("%016llx\n", (unsigned long long)XXH3_64bits(text[i], strlen(text[i])));
    return 0;
}
END_C
# shellcheck disable=SC2086 # CC may hold flags
${CC:-gcc} -O1 "$work/xxh3.c" -o "$work/xxh3" && "$work/xxh3" "It rained." "It" >"$work/xxh3.txt"

part api xxhash
part parquet xxhash pyarrow numpy yaml

printf '%d passed, %d failed' "$passed" "$failed"
if [ "$skipped" -gt 0 ]; then printf ', %d skipped' "$skipped"; fi
printf '\n'
[ "$failed" = 0 ]
