"""TRL in an environment of its own, and its measurement from there.

Invariant: Hone's environment is left alone; TRL's is complete or not there. Run with
`python -m benchmarks.trl_environment` to make it and print its Python.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from benchmarks.proofs import ROOT, run_timed
from cluster.config import Config, PretrainedPolicy
from cluster.errors import StageError

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hone"
INSTALL_S, PEER_S = 1200.0, 3600.0
COMPLETE = ".complete"
OURS = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")  # what Hone sets for its threads; the peer has its own


class SavedWeights(msgspec.Struct, frozen=True):
    """Of a policy after `step` steps, and the seconds of training until then."""

    step: int
    seconds: float


class PeerRun(msgspec.Struct, frozen=True):
    """What `benchmarks.trl_peer` prints; lists are of the steps after the first."""

    version: str
    transformers: str
    torch: str
    threads: int
    dtype: str
    num_parameters: int
    micro_batch: int
    median_step_s: float
    step_s: list[float]
    tokens: list[float]
    saved: list[SavedWeights] = []

    @property
    def mean_step_s(self) -> float:
        return fmean(self.step_s)


def environment() -> Path:
    """The Python of TRL's environment, made by the first call: `requirements/trl.txt`, the rest as
    `requirements/cpu.txt` has it, into the user's cache (as large as torch; no vLLM, no Ray).

    Raises `StageError` with what uv says.
    """
    locks = [ROOT / "requirements" / name for name in ("trl.txt", "cpu.txt")]
    key = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()[:12]
    place = CACHE_DIR / f"trl-{key}"
    python = place / "bin" / "python"
    if not (place / COMPLETE).is_file():
        shutil.rmtree(place, ignore_errors=True)
        uv = Path(sys.executable).with_name("uv")
        _run([uv, "venv", "-q", "-p", sys.executable, place])
        flags, variables = _torch_source()
        # The lock names the hash of torch for Python 3.11 alone.
        flags += [] if sys.version_info[:2] == (3, 11) else ["--no-verify-hashes"]
        install = [uv, "pip", "install", "-q", "-p", python, *flags, "-r", locks[0], "-c", locks[1]]
        _run(install, variables)
        (place / COMPLETE).touch()
    return python


def _torch_source() -> tuple[list[str], dict[str, str]]:
    """As scripts/bootstrap finds the CPU build: a folder that pip is told of, or torch's index."""
    told = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if not told:
        asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    links = ",".join(told.split())
    return ([], {"UV_FIND_LINKS": links}) if links else (["--torch-backend", "cpu"], {})


def _run(command: Sequence[str | Path], variables: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            env=os.environ | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StageError("trl", f"its environment cannot be made: {error}") from error
    if done.returncode != 0:
        raise StageError("trl", f"its environment cannot be made: {done.stderr[-1000:]}")


def measure(
    config: Config,
    tasks: Path,
    micro_batch: int,
    num_steps: int,
    save_every: int = 0,
    save_in: Path | None = None,
) -> PeerRun:
    """TRL on the policy, rule, sampling, learning rate and seed of `config`; `tasks` is the file
    for TRL. Every `save_every` steps, if not 0, its weights go to `save_in`/step-N.
    """
    assert isinstance(config.policy, PretrainedPolicy)
    rollout = config.rollout
    [verifier] = config.rewards.verifiers.values()
    options = {
        "policy": config.policy.model,
        "tasks": tasks,
        "samples": rollout.groups_per_step * rollout.group_size,
        "group-size": rollout.group_size,
        "micro-batch": micro_batch,
        "max-new-tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "lr": config.learner.lr,
        "steps": num_steps,
        "reward": verifier.use.rpartition(":")[2],
        "seed": config.run.seed,
    }
    if save_every:
        options |= {"save-every": save_every, "save-in": save_in}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    without = [word for name in OURS for word in ("-u", name)]
    command = ["env", *without, environment(), "-m", "benchmarks.trl_peer", *words]
    run = run_timed(command, ROOT, PEER_S)
    lines = [line for line in run.output.splitlines() if line.startswith('{"system": "trl"')]
    if run.code != 0 or not lines:
        raise StageError("trl", f"exit code {run.code}: {run.output[-2000:]}")
    found = msgspec.json.decode(lines[-1], type=PeerRun)
    if found.dtype != "torch.float32":
        raise StageError("trl", f"must train in torch.float32, got {found.dtype}")
    return found


if __name__ == "__main__":
    print(environment())
