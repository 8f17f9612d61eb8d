#!/usr/bin/env bash
# Convert the tiny checkpoint, train on two processes, write the report. PYTHON: the interpreter to use.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

rm -rf runs/quickstart  # a quickstart starts anew
if [ ! -d runs/tiny_world_megatron ]; then
    "$PYTHON" -m megatron_sage convert hf-to-megatron examples/tiny_world/model runs/tiny_world_megatron
fi
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_sage train examples/quickstart/quickstart.yaml "$@"
"$PYTHON" -m megatron_sage report runs/quickstart
