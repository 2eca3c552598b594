#!/bin/sh
# One GPU, ten minutes from an installed environment: what runs, how fast, and what this machine cannot show.
# From a fresh checkout: benchmarks/gpu_smoke.sh (it makes .venv for GPUs first; docs/gpu.md).
set -eu
cd "$(dirname "$0")/.."
command -v nvidia-smi >/dev/null 2>&1 || { echo "no NVIDIA driver here: nothing was exercised" >&2; exit 2; }

echo "== machine"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
scripts/bootstrap gpu || { echo "the gpu environment could not be made: nothing was exercised" >&2; exit 2; }
# The lock of an environment for training has no test tools; the other one pins them.
.venv/bin/uv pip install -q -p .venv/bin/python -c requirements/cpu.txt pytest pytest-asyncio pytest-timeout
.venv/bin/python -c 'import torch, vllm, ray; print(f"torch {torch.__version__}, vllm {vllm.__version__}, ray {ray.__version__}")'
.venv/bin/hone doctor || true

echo "== tests"
started=$(date +%s)
code=0
.venv/bin/python -m pytest tests/gpu -q -rA --durations=0 || code=$?
echo "$(($(date +%s) - started)) s, exit code $code"

[ "$code" -eq 0 ] && echo "== exercised" || echo "== would have been exercised: not all tests passed"
echo "- a bfloat16 vLLM engine and a bfloat16 FSDP2 rank in processes of their own on one GPU (resources.layout=colocated)"
echo "- weights from rank to engine as a file in shared memory; log-probs of both against each other after each sync"
echo "- four GRPO steps, a held-out evaluation, a checkpoint, a second run that resumes from it"
echo "- an engine that sleeps and wakes: memory given back, equal samples; four steps by turns (resources.layout=alternating)"
echo "- weights from rank to engine over CUDA IPC on that GPU (sync.transport=shared)"
echo "== not exercised by this script"
gpus=$(nvidia-smi -L | grep -c '^GPU ')
[ "$gpus" -gt 1 ] || echo "- several ranks, tensor-parallel engines, NCCL between processes (one GPU here)"
[ "$gpus" -le 1 ] || echo "- the other $((gpus - 1)) GPUs: several ranks, tensor-parallel engines, NCCL between processes"
.venv/bin/python -c 'import flash_attn' 2>/dev/null || echo "- flash-attn (not installed: torch's own attention was used)"
echo "- weights over NCCL (sync.transport=broadcast: needs a GPU for each member)"
echo "- a pretrained model and long contexts (no model hub is asked)"
exit "$code"
