"""A process reward model of a run's own rollouts: export a checkpoint, sample, estimate, train.

Invariant: `DEST` is complete or absent; the run itself is only read. Called by
`hone rewards train-process`.
"""

import asyncio
import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from actors.process_training import TraceSampler, TraceSettings, train
from actors.step_estimates import StepValues
from cluster import config_file
from cluster.errors import ConfigError, boundary
from cluster.run_dir import RunDir
from cluster.types import Task
from learners.process_model import ProcessModelSettings, require_layers
from rewards.tasksets import load_tasks
from serve import export

__all__ = ["ProcessModelSettings", "TraceSettings", "run"]
TRACES = "traces.jsonl"


def run(run_dir: RunDir, dest: Path, traces: TraceSettings, training: ProcessModelSettings) -> None:
    """Write the model to the new directory `dest`, with its labelled traces beside the weights."""
    if dest.exists():
        raise ConfigError(f"{dest}: must not exist yet")
    config = config_file.load(run_dir.config)
    building = dest.with_name(f".{dest.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="hone-process-") as place:
        print(f"exporting the newest checkpoint of {run_dir.name}", flush=True)
        policy_dir = export.write(run_dir, Path(place) / "policy", None)
        try:
            with boundary("train-process"):
                require_layers(policy_dir, training.new_layers)
                tasks = load_tasks(config.tasks, "train")
                labelled = asyncio.run(_label(TraceSampler(config, policy_dir), tasks, traces))
                for progress in train(policy_dir, labelled, training, building):
                    print(
                        f"epoch {progress.epoch} of {progress.epochs}: loss {progress.loss:.3f}, "
                        f"held-out step AUC {progress.auc:.3f}",
                        flush=True,
                    )
                lines = b"\n".join(msgspec.json.encode(trace) for trace in labelled)
                (building / TRACES).write_bytes(lines + b"\n")
                building.rename(dest)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    print(f"{dest}: use it as `scorer: {{use: classifier, settings: {{model: {dest}}}}}`")


async def _label(
    sampler: TraceSampler, tasks: list[Task], settings: TraceSettings
) -> list[StepValues]:
    started = time.monotonic()
    print("loading the engine", flush=True)
    labelled: list[StepValues] = []
    try:
        await sampler.start()
        print(f"engine ready after {time.monotonic() - started:.0f} s", flush=True)
        num_tasks = 0
        async for traces in sampler.estimate(tasks, settings):
            labelled += traces
            num_tasks += 1
            if num_tasks % 16 == 0:
                num_steps = sum(len(trace.values) for trace in labelled)
                print(
                    f"{num_tasks} tasks, {len(labelled)} traces, {num_steps} steps "
                    f"({time.monotonic() - started:.0f} s)",
                    flush=True,
                )
    finally:
        await sampler.close()
    return labelled
