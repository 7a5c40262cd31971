#!/usr/bin/env bash
# The whole of it from nothing, on one machine: a corpus, activations, explanations, warm start of AR and AV, RL, evaluation.
#
#     data/reproduce.sh [--small] [DIR]       DIR: where everything goes (default: reproduce, or reproduce-small)
#     data/reproduce.sh --check [DIR]         the table of docs/results.md again: the committed pair on its held-out documents
#     MODEL=Gemma-3-270M LAYER=12 data/reproduce.sh --small DIR
#
# The run files are data/smollm2-l20/{ar,av,rl}.yaml. --small takes half an hour on two quiet cores: fewer documents, fewer steps. A stage
# whose result is there is not run again, and a training run that was interrupted goes on, so the same command resumes.
# DOCUMENTS, STEPS_AR, STEPS_AV, STEPS_RL and EVAL_ROWS in the environment: other sizes than those below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

how="" dir=""
for argument; do
    case $argument in
    --small | --check) how=$argument ;;
    -*) echo "reproduce.sh: no option '$argument'; usage: data/reproduce.sh [--small | --check] [DIR]" >&2; exit 2 ;;
    *)
        if [ -n "$dir" ]; then echo "reproduce.sh: one DIR, not '$dir' and '$argument'" >&2; exit 2; fi
        dir=$argument
        ;;
    esac
done
dir=${dir:-reproduce${how/--/-}}
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
if [ "$how" = --small ]; then
    documents=${DOCUMENTS:-1800} steps_ar=${STEPS_AR:-160} steps_av=${STEPS_AV:-480} steps_rl=${STEPS_RL:-32} eval_rows=${EVAL_ROWS:-100}
else
    documents=${DOCUMENTS:-7200} steps_ar=${STEPS_AR:-} steps_av=${STEPS_AV:-} steps_rl=${STEPS_RL:-} eval_rows=${EVAL_ROWS:-300}
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

extract() { # extract CORPUS OUT [OPTION...]
    local corpus=$1 out=$2 resume=""
    shift 2
    if [ -e "$out.partial" ]; then resume=--resume; fi
    # shellcheck disable=SC2086 # options or none
    "$NLA" data extract $bf16 --model "$model" ${layer:+--layer $layer} --in "$corpus" --max-length 192 --out "$out" $resume "$@"
}
# explain ACTS STAGE OUT [DIGITS]: by a language model where there is one's text, elsewhere by rules: rows whose id begins with one of
# DIGITS. Half of the rows do for training, so that the language model's texts, one of ten rows, weigh twice.
explain() {
    local acts=$1 list=$3.rules.jsonl
    "$NLA" data explain --acts "$acts" --by rules --words 45 --out "$3.all.jsonl"
    grep "^{\"row_id\": \"[${4:-0-9a-f}]" "$3.all.jsonl" >"$3.rules.jsonl"
    if [ -n "$written" ]; then
        "$NLA" data explain --acts "$acts" --by file --in $written --out "$3.written.jsonl"
        list=$3.written.jsonl,$list
    fi
    "$NLA" data build --acts "$acts" --stage "$2" --explanations "$list" --out "$3"
}
train() { # train STAGE STEPS key=value...
    local stage=$1 steps=$2
    shift 2
    # shellcheck disable=SC2046,SC2086 # options or none
    "$NLA" train "$stage" $bf16 --config "$recipe/$stage.yaml" "out=$dir/$stage" "steps=$steps" "eval=$dir/rows/held" "$@" $(resumed "$dir/$stage")
}
at_both() { # at_both NAME OPTION...: read at temperature 0, and as `./build.sh demo` reads
    local name=$1 temperature
    shift
    for temperature in 0 0.7; do
        printf '\nat temperature %s\n' $temperature
        # shellcheck disable=SC2086 # an option or none
        "$NLA" eval $bf16 --temperature $temperature --rows "$eval_rows" --html "$dir/$name-$temperature.html" "$@"
    done
}
evaluate() { # evaluate NAME AV AR ROWS [OPTION...]
    local name=$1 av=$2 ar=$3 rows=$4
    shift 4
    to_file "$dir/$name.txt" at_both "$name" --av "$av" --ar "$ar" --acts "$rows" "$@"
}
check() { # the committed pair on the documents that were held out of its training, captured anew
    if ! (cd "$dir/corpus" && sha256sum --quiet -c -) <"$recipe/corpus.sha256"; then
        say "this corpus is not the one the pair was trained with (Debian's packages have moved on); figures will differ a little"
    fi
    grep -F -f "$recipe/held.txt" "$dir/corpus/corpus.jsonl" >"$dir/held.jsonl"
    stage "held-out activations" "$dir/held/nla_meta.yaml" extract "$dir/held.jsonl" "$dir/held"
    stage "explanations of held-out rows" "$dir/rows/held/nla_meta.yaml" explain "$dir/held" ar_sft "$dir/rows/held"
    stage "evaluation of the committed pair" "$dir/check.txt" evaluate check "$recipe/av" "$recipe/ar" "$dir/rows/held"
    cat "$dir/check.txt"
}

mkdir -p "$dir/rows" "$dir/start" "$dir/pair"
stage "model" "$model/model.safetensors" python3 data/get_model.py "$MODEL" "$model"
stage "corpus" "$dir/corpus/corpus.jsonl" data/corpus.sh "$dir/corpus"
if [ "$how" = --check ]; then
    check
    exit
fi
stage "activations" "$dir/base/nla_meta.yaml" extract "$dir/corpus/corpus.jsonl" "$dir/base" --documents "$documents"
stage "split" "$dir/parts/held/nla_meta.yaml" "$NLA" data split --acts "$dir/base" --out "$dir/parts"
stage "explanations for the AR" "$dir/rows/ar_sft/nla_meta.yaml" explain "$dir/parts/ar_sft" ar_sft "$dir/rows/ar_sft" 0-7
stage "explanations for the AV" "$dir/rows/av_sft/nla_meta.yaml" explain "$dir/parts/av_sft" av_sft "$dir/rows/av_sft" 0-7
stage "explanations of held-out rows" "$dir/rows/held/nla_meta.yaml" explain "$dir/parts/held" ar_sft "$dir/rows/held"
stage "untrained AV and AR" "$dir/start/ar/nla_meta.yaml" \
    "$NLA" init --model "$model" ${layer:+--layer "$layer"} --acts "$dir/base" --av "$dir/start/av" --ar "$dir/start/ar"

ar=$(steps_of ar "$steps_ar") av=$(steps_of av "$steps_av") rl=$(steps_of rl "$steps_rl")
stage "AR, warm start" "$dir/ar/checkpoint-$ar/ar" train ar "$ar" "ar=$dir/start/ar" "data=$dir/rows/ar_sft"
warm_ar=$dir/ar/checkpoint-$ar/ar warm_av=$dir/av/checkpoint-$av/av end=$dir/rl/checkpoint-$rl
stage "AV, warm start" "$warm_av" train av "$av" "av=$dir/start/av" "ar=$warm_ar" "data=$dir/rows/av_sft"
stage "evaluation of the warm start" "$dir/eval-warm.txt" evaluate eval-warm "$warm_av" "$warm_ar" "$dir/rows/held" --train "$dir/rows/ar_sft"
stage "RL" "$end/av" train rl "$rl" "av=$warm_av" "ar=$warm_ar" "data=$dir/parts/rl"
stage "evaluation after RL" "$dir/eval-rl.txt" evaluate eval-rl "$end/av" "$end/ar" "$dir/rows/held" --train "$dir/rows/ar_sft"
for run in ar av rl; do stage "curves of $run" "$dir/$run/report.html" "$NLA" report "$dir/$run"; done
for side in av ar; do
    stage "the pair, $side" "$dir/pair/$side/nla_meta.yaml" \
        "$NLA" export "$end/$side" --dtype bf16 --base "$(realpath "$model")" --out "$dir/pair/$side"
done

for name in eval-warm eval-rl; do printf '\n== %s\n' $name; cat "$dir/$name.txt"; done
printf '\n== seconds a stage took\n'
cat "$dir/times.tsv"
say "the pair is in $dir/pair; read with it: ./nla explain --model $model --av $dir/pair/av --ar $dir/pair/ar --html page.html \"your text\""
