#!/usr/bin/env bash
# Everything worth doing with a GPU that is at hand for half an hour: build, conformance suite on every
# backend, the GPU targets, the benchmark grid, a short PPO run. No arguments; a part that fails does not
# stop the others. PARTS="build targets" runs some of the parts only, where one session must be short.
# Logs and figures go to $OUT (default: benchmarks/results/gpu); it ends with a table. Installs nothing:
# peers that are missing are named in the tables.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-build info targets rollout cuda conformance grid ppo}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT"
names=() results=() seconds=()

part() { # part NAME LIMIT_SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
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

# The limits add up to 29 minutes. The grid writes what it has after each case.
part build 240 "$PYTHON" setup.py build_ext --inplace
part info 30 "$PYTHON" -m rlhf_kernels.info
part targets 300 "$PYTHON" -m benchmarks.vocabulary --device cuda --output "$OUT/vocabulary-cuda.json"
part rollout 120 "$PYTHON" -m benchmarks.rollout --device cuda --output "$OUT/rollout-cuda.json"
part cuda 150 "$PYTHON" -m pytest tests/kernels -q -k cuda
part conformance 270 "$PYTHON" -m pytest tests/kernels -q -k "not cuda"
grid=$(mktemp -d)
part grid 450 "$PYTHON" -m rlhf_kernels.bench --device cuda --size large --dtypes bfloat16 --output "$grid"
cp "$grid"/bench.csv "$grid"/bench.json "$OUT" 2>/dev/null
compgen -G "$grid/*.png" >/dev/null && tar -czf "$OUT/plots.tgz" -C "$grid" .
rm -r "$grid"
part ppo 180 "$PYTHON" -m pytest tests/ppo -q

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
