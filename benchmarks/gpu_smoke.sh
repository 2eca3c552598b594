#!/bin/sh
# One GPU, ten minutes: what runs, how fast, and what this machine cannot show. From a fresh checkout:
#   benchmarks/gpu_smoke.sh
set -eu
cd "$(dirname "$0")/.."
command -v nvidia-smi >/dev/null 2>&1 || { echo "no NVIDIA driver here: nothing was exercised" >&2; exit 2; }

echo "== machine"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
scripts/bootstrap gpu || { echo "the gpu environment could not be made: nothing was exercised" >&2; exit 2; }
.venv/bin/python -c 'import torch, vllm, ray; print(f"torch {torch.__version__}, vllm {vllm.__version__}, ray {ray.__version__}")'
.venv/bin/hone doctor || true

echo "== tests"
code=0
.venv/bin/python -m pytest tests/gpu -q -rA --durations=0 || code=$?

echo "== exercised, if the tests above passed"
echo "- a bfloat16 vLLM engine and a bfloat16 FSDP2 rank of one process on one GPU, placed by resources.layout=colocated"
echo "- log-probs of engine and learner against each other after each weight sync; checkpoint and resume"
echo "== not exercised by this script"
gpus=$(nvidia-smi -L | grep -c '^GPU ')
[ "$gpus" -gt 1 ] || echo "- several ranks, tensor-parallel engines, NCCL between processes (one GPU here)"
.venv/bin/python -c 'import flash_attn' 2>/dev/null || echo "- flash-attn (not installed: torch's own attention was used)"
echo "- NCCL and IPC weight transfer, sleep and wake of engines (not connected: weights travel as a file)"
echo "- a pretrained model and long contexts (no model hub is asked)"
exit "$code"
