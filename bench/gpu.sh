#!/bin/sh
# The measurement on a GPU: bench/gpu.sh OUT [--wheels DIR] [--dry-run]; see docs/bench.md.
# --wheels: install onnxruntime-gpu and what else is missing from DIR, without a network.
# --dry-run: the same commands on the CPU with a tiny stand-in, to see that they run.
set -eu
out=$1
shift
width=192 frames=256 device=cuda precision=fp16-compute
while [ $# -gt 0 ]; do
    case $1 in
    --wheels)
        site=$(mktemp -d)
        python3 -m pip install -q --no-index --no-deps --upgrade --target "$site" "$2"/*.whl
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
        shift 2
        ;;
    --dry-run)
        width=32 frames=32 device=cpu precision=fp16
        shift
        ;;
    *)
        echo "gpu.sh: there is no option $1" >&2
        exit 2
        ;;
    esac
done
mkdir -p "$out"
bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$out/gpu.csv"
speed="python3 -m bridge.cli bench speed --full --device $device"
python3 -m bench.speed.stand_in --out "$bundle/stand-in" --width $width --frames $frames --precision $precision
$speed --no-reference --model "$bundle/stand-in" --out "$out/full-size"
$speed --no-reference --model "$bundle/stand-in" --cuda-graph --out "$out/full-size-cuda-graph"
$speed --no-reference --out "$out/default"
