"""On one GPU: an engine that sleeps gives its memory back and wakes as it was; a run by turns,
whose weights travel by CUDA IPC.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from actors.placement import EngineSettings
from actors.rollout import Completion, Sampling
from tests.gpu.test_one_gpu import HONE, ON_ONE_GPU, ROOT, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here"),
]
FRACTION = 0.3


def memory_mib(what: str) -> int:
    """`used` or `total` of the first GPU, by whichever process."""
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[0])


async def test_an_engine_that_sleeps_gives_its_memory_back_and_wakes_as_it_was(
    tiny_policy_dir: Path,
) -> None:
    from actors.vllm_engine import VllmEngine

    settings = EngineSettings(
        policy_dir=tiny_policy_dir, dtype="bfloat16", context_length=128, tensor_parallel_size=1,
        is_gpu=True, kv_cache_gib=1.0, gpu_memory_fraction=FRACTION, max_num_seqs=16,
        can_sleep=True,
    )  # fmt: skip
    engine = VllmEngine(settings)
    try:
        await engine.start()

        async def sampled() -> list[Completion]:
            context = np.arange(5, 25, dtype=np.int32)
            return await engine.generate(context, 2, Sampling(16, 1.0, [], seed=3))

        before, awake = await sampled(), memory_mib("used")
        await engine.sleep()
        asleep = memory_mib("used")
        await engine.wake()
        after = await sampled()
    finally:
        engine.shutdown()
    print(f"{awake} MiB awake, {asleep} asleep")  # shown by benchmarks/gpu_smoke.sh
    assert awake - asleep > 0.5 * FRACTION * memory_mib("total")
    for first, second in zip(before, after, strict=True):
        assert first.segment.token_ids.tolist() == second.segment.token_ids.tolist()


def test_a_run_takes_its_steps_by_turns(tmp_path: Path) -> None:
    done = subprocess.run(
        [HONE, "train", "deploy/configs/quickstart.yaml", "--run", "turns", f"run.dir={tmp_path}",
         *ON_ONE_GPU, "resources.layout=alternating", "rollout.max_policy_age=0",
         "rollout.gpu_memory_fraction=0.6", "sync.transport=shared"],
        cwd=ROOT, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = rows(tmp_path / "turns" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all(row["policy_age/max"] == 0 for row in metrics[1:])
    events = (tmp_path / "turns" / "events.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["kind"] for line in events}
    assert not kinds & {"worker_died", "sharing_failed", "engine_quarantined"}
