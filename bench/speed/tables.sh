#!/usr/bin/env bash
# The tables of bench/results/README.md, in at most 30 minutes on an otherwise idle machine.
#
#     bench/speed/tables.sh KEEP LLAMA OUT
#
# KEEP and LLAMA hold what `step.py --prepare` and `llamacpp.py --prepare` wrote; OUT receives a text and a JSON file
# for each table.  Drop the file caches before (as root: echo 3 > /proc/sys/vm/drop_caches), or artifacts may not be
# mapped in large pages.  What is most worth knowing comes first, and no table may take longer than its share.
set -u
keep=$1 llama=$2 out=$3
bench=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
mkdir -p "$out"

table() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    if ((SECONDS + limit > ${BUDGET:-1800})); then
        echo "$name: left out, no time for it"
        return
    fi
    timeout "$limit" "$python" "$@" --json "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.err" ||
        echo "$name: stopped with $?, what there is stands in $out/$name.txt"
    echo "$SECONDS s: $name"
}

step="$bench/speed/step.py --keep $keep --rounds 9"
table step_mid_bfloat16_1 180 $step --windows 32 8 64 --threads 1
table llamacpp 180 "$bench"/speed/llamacpp.py --keep "$llama" --rounds 3
table step_mid_bfloat16_2 180 $step --windows 32 8 64 --threads 2
table step_mid_float32_1 240 $step --windows 32 8 64 --threads 1 --dtypes float32
table step_mid_float32_2 240 $step --windows 32 8 64 --threads 2 --dtypes float32
table step_wide_bfloat16_1 240 $step --model wide --windows 32 8 64 --threads 1
table step_wide_bfloat16_2 240 $step --model wide --windows 32 8 64 --threads 2
table kernels_moe 60 "$bench"/speed/kernels.py --only moe --threads 1 --rows 32 --dtypes bf16 --budget 0.5
table step_wide_float32_1 240 $step --model wide --windows 32 8 64 --threads 1 --dtypes float32 --against eager
table step_wide_float32_2 240 $step --model wide --windows 32 8 64 --threads 2 --dtypes float32 --against eager
table cost 120 "$bench"/speed/cost.py --count 32
table kernels_attend 60 "$bench"/speed/kernels.py --only attend --threads 1 --rows 8 32 --dtypes bf16 --contexts 192 8192 --budget 0.3
table floors 150 "$bench"/speed/floors.py --rounds 9
table moe 180 "$bench"/quality/moe.py --count 16 --rounds 2
tail -n 8 "$out"/*.txt
