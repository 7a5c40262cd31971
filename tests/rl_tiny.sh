#!/usr/bin/env bash
# That RL learns, on a tiny random model in some four minutes: warm start of AV and AR, then RL, and RL with the AV shown the vectors of
# other rows (the control). With RL the reward and the held-out FVE rise; in the control the FVE falls to that of exchanged texts.
#
#     tests/rl_tiny.sh DIR        writes the runs to DIR; then: nla report DIR/rl, nla report DIR/control
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NLA=${NLA:-./nla}
out=${1:?a directory for the runs}
pair=tests/golden/pair_llama
mkdir -p "$out"

documents() { # documents SEED COUNT: random words
    awk -v seed="$1" -v count="$2" 'BEGIN { srand(seed); n = split("bread water letter storm king river price engine friend garden", w, " ")
        for (i = 0; i < count; i++) { printf "{\"id\": \"s%d-%d\", \"text\": \"", seed, i
            for (j = 0; j < 24; j++) printf "%s%s", j ? " " : "", w[1 + int(rand() * n)]
            print "\"}" } }'
}
rows() { # rows NAME SEED COUNT: activations, explained by the text's last two words
    documents "$2" "$3" >"$out/$1.jsonl"
    "$NLA" capture --model $pair/av --layer 2 --in "$out/$1.jsonl" --out "$out/$1" --positions 4 --quiet
    awk '{ t = $0; sub(/.*"text": "/, "", t); sub(/".*/, "", t); n = split(t, w, " "); sub(/}$/, "")
        print $0 ", \"explanation\": \"The text has come to " w[n] ".\\n\\nBefore it stood " w[n - 1] " and another must follow.\"}" }' \
        "$out/$1/rows.jsonl" >"$out/rows" && mv "$out/rows" "$out/$1/rows.jsonl"
}
rows train 1 300
rows held 2 60
common=("data=$out/train" "eval=$out/held" eval_rows=200 max_tokens=70 save_every=5000)
"$NLA" train av "out=$out/av" av=$pair/av steps=3000 batch=32 micro=32 lr=2e-3 eval_every=300 "${common[@]}"
"$NLA" train ar "out=$out/ar" ar=$pair/ar steps=600 batch=32 micro=32 lr=3e-3 "${common[@]}"
rl=("av=$out/av/checkpoint-3000/av" "ar=$out/ar/checkpoint-600/ar" steps=400 vectors=16 samples=8 micro=16 lr=2e-4 ar_lr=1e-3 warmup=10
    eval_every=40 "${common[@]}")
"$NLA" train rl "out=$out/rl" "${rl[@]}"
"$NLA" train rl "out=$out/control" permute=true "${rl[@]}"
