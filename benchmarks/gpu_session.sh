#!/usr/bin/env bash
# Everything worth doing with a GPU that is at hand for half an hour: build, conformance suite on every
# backend, benchmarks, a short PPO run. No arguments; a part that fails does not stop the others.
# Logs and figures go to $OUT (default: benchmarks/results/gpu); it ends with a table.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT"
names=() results=() seconds=()

part() { # part NAME LIMIT_SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    tail -n 3 "$OUT/$name.log"
    names+=("$name") seconds+=($((SECONDS - start)))
    case $status in
        0) results+=(ok) ;;
        124) results+=("over ${limit}s") ;;
        *) results+=("failed ($status)") ;;
    esac
}

part build 300 "$PYTHON" setup.py build_ext --inplace
part info 60 "$PYTHON" -m rlhf_kernels.info
part conformance 480 "$PYTHON" -m pytest tests/kernels -q
part benchmarks 420 "$PYTHON" -m benchmarks.foundation --output "$OUT/foundation.json"
part ppo 240 "$PYTHON" -m pytest tests/ppo -q

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$PYTHON" -c 'import torch; print("torch", torch.__version__)'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)'
    git rev-parse HEAD
} >"$OUT/machine.txt" 2>&1

printf '\n%-14s %-14s %s\n' part result seconds
for i in "${!names[@]}"; do
    printf '%-14s %-14s %s\n' "${names[$i]}" "${results[$i]}" "${seconds[$i]}"
done
