"""What one GPU can show: bf16 engines against the learner, a shared GPU, a whole run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here"),
]
ROOT = Path(__file__).parents[2]
HONE = Path(sys.executable).parent / "hone"
ON_ONE_GPU = [
    "resources.accelerator=gpu", "resources.layout=colocated", "resources.engine_gpu_share=0.4",
    "rollout.gpu_memory_fraction=0.3", "policy.dtype=bfloat16", "sync.probe_bound=0.1",
    "policy.hidden_size=256", "policy.num_heads=4", "warm_start.steps=300", "run.steps=4",
    "run.checkpoint_every=2", "eval.every=4", "eval.tasks=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart on one GPU that an engine and a learner rank share."""
    place = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [HONE, "train", "deploy/configs/quickstart.yaml", "--run", "gpu", f"run.dir={place}",
         *ON_ONE_GPU],
        cwd=ROOT, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "gpu"


def rows(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_four_steps_on_a_gpu_shared_by_engine_and_rank(run_path: Path) -> None:
    metrics = rows(run_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all(row["grad/norm"] > 0 for row in metrics[1:])
    for row in metrics[1:]:  # shown by benchmarks/gpu_smoke.sh
        print(
            f"step {row['step']}: {row['time/step_s']:.2f} s, {row['sync/total_s']:.2f} s of it a "
            f"weight sync; {row['rollout/tokens_per_s']:.0f} sampled tokens/s"
        )


def test_engine_and_learner_agree_in_bf16(run_path: Path) -> None:
    for row in rows(run_path / "metrics.jsonl")[1:]:
        assert row["ratio/mismatch_abs_mean"] < 0.05
        assert row["sync/probe_error"] < 0.1


def test_a_second_run_resumes_on_the_gpu(run_path: Path) -> None:
    done = subprocess.run(
        [HONE, "train", "deploy/configs/quickstart.yaml", "--run", "gpu", "--resume",
         f"run.dir={run_path.parent}", *ON_ONE_GPU, "run.steps=5"],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(run_path / "metrics.jsonl")[-1]["step"] == 5
