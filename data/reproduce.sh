#!/usr/bin/env bash
# The whole of it from nothing, on one machine: a corpus, activations, explanations, warm start of AR and AV, RL, evaluation.
#
#     data/reproduce.sh [--small] [DIR]       DIR: where everything goes (default: reproduce, or reproduce-small)
#     MODEL=Gemma-3-270M LAYER=12 data/reproduce.sh --small DIR
#
# The run files are data/smollm2-l20/{ar,av,rl}.yaml. --small takes about an hour on two cores: fewer documents, fewer steps. A stage
# whose result is there is not run again, and a training run that was interrupted goes on, so the same command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

small=0 dir=""
for argument; do
    case $argument in
    --small) small=1 ;;
    -*) echo "reproduce.sh: no option '$argument'; usage: data/reproduce.sh [--small] [DIR]" >&2; exit 2 ;;
    *)
        if [ -n "$dir" ]; then echo "reproduce.sh: one DIR, not '$dir' and '$argument'" >&2; exit 2; fi
        dir=$argument
        ;;
    esac
done
if [ $small = 1 ]; then dir=${dir:-reproduce-small}; else dir=${dir:-reproduce}; fi
NLA=${NLA:-./nla}
MODEL=${MODEL:-SmolLM2-135M-Instruct}
model=models/$MODEL
written=data/explanations/smollm2-l20.jsonl
if [ "$MODEL" = SmolLM2-135M-Instruct ]; then LAYER=${LAYER:-20}; else written=""; fi
layer=${LAYER:-}
recipe=data/smollm2-l20
bf16="" # products of rounded inputs take about half the time, where the processor has them
if grep -qs avx512_bf16 /proc/cpuinfo; then bf16=--bf16; fi

# What --small takes less of.
if [ $small = 1 ]; then
    documents=1200 steps_ar=240 steps_av=160 steps_rl=12 eval_rows=80
else
    documents=30000 steps_ar="" steps_av="" steps_rl="" eval_rows=300
fi

say() { printf 'reproduce.sh: %s\n' "$*"; }
steps_of() { # steps_of STAGE STEPS: as given, or as the run file says
    if [ -n "$2" ]; then echo "$2"; else sed -n 's/^steps: *\([0-9]*\).*/\1/p' "$recipe/$1.yaml"; fi
}
stage() { # stage NAME RESULT COMMAND...: runs it unless the result is there; times go to times.tsv
    local name=$1 result=$2 begin=$SECONDS
    shift 2
    if [ -e "$result" ]; then return 0; fi
    say "$name"
    "$@"
    if [ ! -e "$result" ]; then say "$name ended without $result" >&2; exit 1; fi
    printf '%s\t%d\n' "$name" $((SECONDS - begin)) >>"$dir/times.tsv"
}
resumed() { # resumed RUN: the option that goes on with an interrupted run
    if compgen -G "$1/checkpoint-*" >/dev/null; then echo --resume; fi
}
to_file() { # to_file FILE COMMAND...: its output, under FILE's name only when it succeeded
    local file=$1
    shift
    "$@" >"$file.tmp"
    mv "$file.tmp" "$file"
}

extract() {
    local resume=""
    if [ -e "$dir/base.partial" ]; then resume=--resume; fi
    # shellcheck disable=SC2086 # an option or none
    "$NLA" data extract --model "$model" ${layer:+--layer $layer} --in "$dir/corpus/corpus.jsonl" --documents $documents \
        --max-length 192 --out "$dir/base" $resume
}
explain() { # explain PART STAGE: by a language model where there is one's text, by rules elsewhere
    local part=$dir/parts/$1 list=$dir/$1.rules.jsonl
    "$NLA" data explain --acts "$part" --by rules --words 70 --out "$dir/$1.rules.jsonl"
    if [ -n "$written" ]; then
        "$NLA" data explain --acts "$part" --by file --in $written --out "$dir/$1.written.jsonl"
        list=$dir/$1.written.jsonl,$list
    fi
    "$NLA" data build --acts "$part" --stage "$2" --explanations "$list" --out "$dir/rows/$1"
}
train() { # train STAGE STEPS key=value...
    local stage=$1 steps=$2
    shift 2
    # shellcheck disable=SC2046,SC2086 # options or none
    "$NLA" train "$stage" $bf16 --config "$recipe/$stage.yaml" "out=$dir/$stage" "steps=$steps" "eval=$dir/rows/held" "$@" $(resumed "$dir/$stage")
}
evaluate() { # evaluate NAME AV AR
    to_file "$dir/$1.txt" "$NLA" eval --av "$2" --ar "$3" --acts "$dir/rows/held" --rows $eval_rows --train "$dir/rows/ar_sft" \
        --max-tokens 150 --html "$dir/$1.html"
}

mkdir -p "$dir/rows" "$dir/start" "$dir/pair"
stage "model" "$model/model.safetensors" python3 data/get_model.py "$MODEL" "$model"
stage "corpus" "$dir/corpus/corpus.jsonl" data/corpus.sh "$dir/corpus"
stage "activations" "$dir/base/nla_meta.yaml" extract
stage "split" "$dir/parts/held/nla_meta.yaml" "$NLA" data split --acts "$dir/base" --out "$dir/parts"
stage "explanations for the AR" "$dir/rows/ar_sft/nla_meta.yaml" explain ar_sft ar_sft
stage "explanations for the AV" "$dir/rows/av_sft/nla_meta.yaml" explain av_sft av_sft
stage "explanations of held-out rows" "$dir/rows/held/nla_meta.yaml" explain held ar_sft
stage "untrained AV and AR" "$dir/start/ar/nla_meta.yaml" \
    "$NLA" init --model "$model" ${layer:+--layer "$layer"} --acts "$dir/base" --av "$dir/start/av" --ar "$dir/start/ar"

ar=$(steps_of ar "$steps_ar") av=$(steps_of av "$steps_av") rl=$(steps_of rl "$steps_rl")
stage "AR, warm start" "$dir/ar/checkpoint-$ar/ar" train ar "$ar" "ar=$dir/start/ar" "data=$dir/rows/ar_sft"
warm_ar=$dir/ar/checkpoint-$ar/ar warm_av=$dir/av/checkpoint-$av/av end=$dir/rl/checkpoint-$rl
stage "AV, warm start" "$warm_av" train av "$av" "av=$dir/start/av" "ar=$warm_ar" "data=$dir/rows/av_sft"
stage "evaluation of the warm start" "$dir/eval-warm.txt" evaluate eval-warm "$warm_av" "$warm_ar"
stage "RL" "$end/av" train rl "$rl" "av=$warm_av" "ar=$warm_ar" "data=$dir/parts/rl"
stage "evaluation after RL" "$dir/eval-rl.txt" evaluate eval-rl "$end/av" "$end/ar"
for run in ar av rl; do stage "curves of $run" "$dir/$run/report.html" "$NLA" report "$dir/$run"; done
for side in av ar; do
    stage "the pair, $side" "$dir/pair/$side/nla_meta.yaml" \
        "$NLA" export "$end/$side" --dtype bf16 --base "$(realpath "$model")" --out "$dir/pair/$side"
done

for name in eval-warm eval-rl; do printf '\n== %s\n' $name; cat "$dir/$name.txt"; done
printf '\n== seconds a stage took\n'
cat "$dir/times.tsv"
say "the pair is in $dir/pair; read with it: ./nla explain --model $model --av $dir/pair/av --ar $dir/pair/ar --html page.html \"your text\""
