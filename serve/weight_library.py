"""Every policy version the endpoint can load, and the file of each.

Invariant: a file that `get` returned stays until `forget` names it no more: published files are
hard-linked the moment they are announced (the run deletes its own after two more versions), and
checkpoints are converted in a process of their own. A file is checked before an engine sees it:
the names and shapes of the policy, all values finite.
"""

# pyright: basic

import asyncio
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster import published
from cluster.checkpoint_store import CheckpointStore
from cluster.errors import StageError
from cluster.run_dir import RunDir
from serve.api_errors import ApiError

KEEP_PUBLISHED = 3
KEEP_CONVERTED = 3
EXPORT_TIMEOUT_S = 600.0
OPTIONAL = ("lm_head.weight", "inv_freq")  # saved by some models, made from others on loading


@dataclass(frozen=True)
class Weights:
    """One loadable version. `path` None means the weights the engine was started with."""

    policy_version: int
    path: Path | None
    stamp: float  # tells two files of one version apart (a run resumed from an older step)


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version as the API lists it."""

    policy_version: int
    source: str  # published, checkpoint, model


class WeightLibrary:
    """`run` None serves a plain model directory: one version, 0."""

    def __init__(self, run: RunDir | None, directory: Path) -> None:
        self._run = run
        self._directory = directory
        self._held: dict[int, Weights] = {}
        self._converted: dict[int, Weights] = {}
        self._seen = 0.0
        self._lock = asyncio.Lock()
        directory.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Weights | None:
        """The newest announced version, kept from now on; None before the first and for a model
        directory.
        """
        if self._run is None:
            return Weights(0, None, 0.0)
        announced = published.read(self._run.weights)
        if announced is not None and announced.time > self._seen:
            self._hold(announced)
        return max(self._held.values(), key=lambda w: w.stamp, default=None)

    def versions(self) -> list[Version]:
        """All versions that can be asked for, oldest first."""
        if self._run is None:
            return [Version(policy_version=0, source="model")]
        sources = dict.fromkeys(self._checkpoints(), "checkpoint")
        sources |= dict.fromkeys(self._held, "published")
        return [Version(policy_version=v, source=sources[v]) for v in sorted(sources)]

    async def get(self, policy_version: int) -> Weights:
        """The file of a version; 404 with the known ones when there is none."""
        if self._run is None and policy_version == 0:
            return Weights(0, None, 0.0)
        held = self._held.get(policy_version) or self._converted.get(policy_version)
        if held is not None:
            return held
        if self._run is None or policy_version not in self._checkpoints():
            known = ", ".join(str(v.policy_version) for v in self.versions()) or "none yet"
            raise ApiError(
                404, f"policy@{policy_version}: no such version (known: {known})",
                code="model_not_found", param="model",
            )  # fmt: skip
        async with self._lock:
            if policy_version not in self._converted:
                self._converted[policy_version] = await self._convert(policy_version)
        return self._converted[policy_version]

    def newest_checkpoint(self) -> int | None:
        return max(self._checkpoints(), default=None)

    def forget(self, in_use: set[int]) -> None:
        """Drop all but the newest files and those of versions `in_use`."""
        for files, keep in ((self._held, KEEP_PUBLISHED), (self._converted, KEEP_CONVERTED)):
            newest = sorted(files, key=lambda v: files[v].stamp)[-keep:]
            for version in [v for v in files if v not in newest and v not in in_use]:
                path = files.pop(version).path
                if path is not None:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _hold(self, announced: published.Published) -> None:
        target = self._directory / f"published_{announced.policy_version:08d}.safetensors"
        temporary = target.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(announced.path, temporary)
        except FileNotFoundError:
            return  # a newer announcement replaces this one
        except OSError:
            shutil.copyfile(announced.path, temporary)  # another file system
        temporary.replace(target)
        self._seen = announced.time
        # Versions above the announced one belong to steps that the run took back.
        for version in [v for v in self._held if v > announced.policy_version]:
            del self._held[version]
        weights = Weights(announced.policy_version, target, announced.time)
        self._held[announced.policy_version] = weights

    def _checkpoints(self) -> list[int]:
        assert self._run is not None
        store = CheckpointStore(self._run.checkpoints, keep=1)
        return [state.policy_version for _, state in store.states()]

    async def _convert(self, policy_version: int) -> Weights:
        """The weights of a checkpoint as one file, made by `hone export` in its own process."""
        assert self._run is not None
        building = self._directory / f"building_{policy_version}"
        shutil.rmtree(building, ignore_errors=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve.cli", "export", str(self._run.path), str(building),
            "--version", str(policy_version),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, problem = await asyncio.wait_for(process.communicate(), EXPORT_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            raise StageError("endpoint", f"export of {policy_version} took too long") from None
        if process.returncode != 0:
            last = problem.decode(errors="replace").strip().splitlines()[-1:]
            raise StageError("endpoint", f"policy@{policy_version} did not export: {last}")
        target = self._directory / f"converted_{policy_version:08d}.safetensors"
        (building / "model.safetensors").replace(target)
        shutil.rmtree(building, ignore_errors=True)
        return Weights(policy_version, target, target.stat().st_mtime)


def check_file(path: Path, policy_dir: Path) -> str:
    """Why an engine must not load `path`; empty when it may. Reads every value: use a thread."""
    import torch
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    try:
        for file in sorted(policy_dir.glob("*.safetensors")):
            shapes |= _shapes(file)
        found = _shapes(path)
    except (OSError, ValueError) as error:
        return f"not a safetensors file: {error}"
    missing = {n for n in shapes.keys() - found.keys() if not n.endswith(OPTIONAL)}
    differing = sorted(missing | {n for n in found if found[n] != shapes.get(n)})
    if shapes and differing:
        return f"tensors differ from the policy's: {', '.join(differing[:3])}"
    try:
        with safe_open(path, framework="pt") as weights:
            for name in found:
                if not bool(torch.isfinite(weights.get_tensor(name)).all()):
                    return f"{name} holds values that are not finite"
    except SafetensorError as error:
        return f"not a safetensors file: {error}"
    return ""


def _shapes(path: Path) -> dict[str, list[int]]:
    """Tensor names and shapes, from the header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100 * 2**20:
            raise ValueError("header too large")
        header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: entry["shape"] for name, entry in header.items()}
