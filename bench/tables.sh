#!/usr/bin/env bash
# The tables of bench/results/README.md, in about ten minutes on an otherwise idle machine.
#
#     bench/tables.sh KEEP LLAMA OUT
#
# KEEP and LLAMA hold what `step.py --prepare` and `llamacpp.py --prepare` wrote; OUT receives a text and a JSON file
# for each table.  What is most worth knowing comes first, and no table may take longer than its share.
set -u
keep=$1 llama=$2 out=$3
python=${PYTHON:-python}
mkdir -p "$out"

table() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    timeout "$limit" "$python" "$@" --json "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.err" ||
        echo "$name: stopped with $?, what there is stands in $out/$name.txt"
}

step="bench/step.py --keep $keep --rounds 9"
table step_mid_bfloat16_1 150 $step --windows 32 8 64 --threads 1
table llamacpp 150 bench/llamacpp.py --keep "$llama" --rounds 3
table step_mid_bfloat16_2 70 $step --windows 32 8 64 --threads 2 --against eager
table step_mid_float32_1 100 $step --windows 32 8 64 --threads 1 --dtypes float32 --against eager
table kernels_moe 60 bench/kernels.py --only moe --threads 1 --rows 32 --dtypes bf16 --budget 0.5
table step_wide_bfloat16_1 75 $step --model wide --windows 32 --threads 1 --against eager
table kernels_attend 60 bench/kernels.py --only attend --threads 1 --rows 8 32 --dtypes bf16 --contexts 192 8192 --budget 0.3
table step_mid_float32_2 60 $step --windows 32 8 64 --threads 2 --dtypes float32 --against ""
table floors 150 bench/floors.py --rounds 9
tail -n 8 "$out"/*.txt
