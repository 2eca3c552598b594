"""Every policy version the endpoint can load, and the file of each.

Invariant: a file that `get` or `newest` returned stays while it is loaded or inside `using`, and
until `forget` names it no more: published files are hard-linked the moment they are seen (the run
deletes its own after two more versions), checkpoints are converted in a process of their own, and
what a decision fixed is kept on disk (`serve.kept_versions`).
"""

import asyncio
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from cluster import published
from cluster.checkpoint_store import CheckpointStore
from cluster.errors import StageError, boundary
from cluster.run_dir import RunDir
from serve.api_errors import ApiError
from serve.kept_versions import SUFFIX, KeptVersions, Weights, file_name, place

KEEP_PUBLISHED = 3
KEEP_RESTORED = 3
EXPORT_TIMEOUT_S = 600.0
MODEL = Weights(0, None, 0.0)


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version as the API lists it."""

    policy_version: int
    source: str  # published, checkpoint, kept, model


class WeightLibrary:
    """What one replica can load; its own links and copies lie in `directory`.

    `run` None serves a plain model directory: one version, 0.
    """

    def __init__(self, run: RunDir | None, directory: Path, kept: KeptVersions) -> None:
        self._run = run
        self._directory = directory
        self._kept = kept
        self._published: dict[int, Weights] = {}
        self._restored: dict[int, Weights] = {}  # from checkpoints and kept files
        self._in_use: Counter[Path] = Counter()
        self._seen = 0.0
        self._lock = asyncio.Lock()
        directory.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Weights | None:
        """The newest announced version, held from now on; None before the first and for a model
        directory.
        """
        if self._run is None:
            return MODEL
        announced = published.read(self._run.weights)
        if announced is not None and announced.time > self._seen:
            self._hold(announced)
        return max(self._published.values(), key=lambda w: w.stamp, default=None)

    def versions(self) -> list[Version]:
        """All versions that can be asked for, oldest first."""
        if self._run is None:
            return [Version(policy_version=0, source="model")]
        sources = dict.fromkeys(self.checkpoints(), "checkpoint")
        sources |= dict.fromkeys(self._kept.all(), "kept")
        sources |= dict.fromkeys(self._published, "published")
        return [Version(policy_version=v, source=sources[v]) for v in sorted(sources)]

    async def get(self, policy_version: int) -> Weights:
        """The file of a version, from wherever there is one now; 404 with the known ones when there
        is none, `StageError` when its checkpoint cannot be converted.
        """
        if self._run is None:
            found = MODEL if policy_version == 0 else None
        else:
            found = self._find(policy_version)
            if found is None:
                self.newest()
                found = self._find(policy_version) or self._hold_earlier(policy_version)
            if found is None:
                found = await self._restore(policy_version)
        if found is None:
            known = ", ".join(str(v.policy_version) for v in self.versions()) or "none yet"
            raise ApiError(
                404, f"policy@{policy_version}: no such version (known: {known})",
                code="model_not_found", param="model",
            )  # fmt: skip
        return found

    def checkpoints(self) -> dict[int, float]:
        """Version of each checkpoint, and when it was written (unix seconds)."""
        found: dict[int, float] = {}
        if self._run is not None:
            for path, state in CheckpointStore(self._run.checkpoints, keep=1).states():
                with suppress(FileNotFoundError):  # removed meanwhile
                    found[state.policy_version] = path.stat().st_mtime
        return found

    @contextmanager
    def using(self, weights: Weights) -> Generator[None]:
        """The file stays while the block runs: from `get` to an engine that holds it."""
        if weights.path is None:
            yield
            return
        self._in_use[weights.path] += 1
        try:
            yield
        finally:
            self._in_use[weights.path] -= 1

    async def store(self, weights: Weights) -> None:
        """Keep the file of a decision on disk; `StageError` when that fails."""
        with boundary("endpoint"), self.using(weights):
            await asyncio.to_thread(self._kept.store, weights)

    async def keep(self, versions: set[int], loaded: Iterable[Weights]) -> None:
        """Keep these versions on disk and no others; files that are missing come from `loaded`."""
        kept = self._kept.all()
        for weights in loaded:
            if weights.policy_version in versions - kept.keys():
                await self.store(weights)
        self._kept.drop_all_but(versions)

    def forget(self, reserved: set[int], loaded: Iterable[Weights]) -> None:
        """Drop all files but the newest, those of versions `reserved` and those in use."""
        self._in_use = +self._in_use
        needed = {weights.path for weights in loaded} | self._in_use.keys()
        for files, keep in ((self._published, KEEP_PUBLISHED), (self._restored, KEEP_RESTORED)):
            newest = sorted(files, key=lambda v: files[v].stamp)[-keep:]
            for version, weights in [*files.items()]:
                if version in newest or version in reserved or weights.path in needed:
                    needed.add(weights.path)
                else:
                    del files[version]
        for path in self._directory.glob(f"*{SUFFIX}"):
            if path not in needed:
                path.unlink(missing_ok=True)

    def _find(self, policy_version: int) -> Weights | None:
        """What is held already, if its file is still there."""
        for files in (self._published, self._restored):
            weights = files.get(policy_version)
            if weights is not None and weights.path is not None:
                if weights.path.is_file():
                    return weights
                del files[policy_version]
        return None

    def _hold(self, announced: published.Published) -> None:
        source = Path(announced.path)
        try:
            weights = self._link(source, announced.policy_version, announced.time)
        except FileNotFoundError:
            if source.exists():
                raise
            return  # a newer announcement replaces this one
        self._seen = announced.time
        # Versions above the announced one belong to steps that the run took back.
        for files in (self._published, self._restored):
            for version in [v for v in files if v > announced.policy_version]:
                del files[version]
        self._restored.pop(announced.policy_version, None)
        self._published[announced.policy_version] = weights

    def _hold_earlier(self, policy_version: int) -> Weights | None:
        """A version announced before the newest one, while the run still has its file."""
        assert self._run is not None
        announced = published.read(self._run.weights)
        if announced is None or announced.policy_version <= policy_version:
            return None
        path = Path(announced.path).with_name(f"policy_{policy_version:08d}{SUFFIX}")
        with suppress(FileNotFoundError):
            weights = self._link(path, policy_version, path.stat().st_mtime)
            self._published[policy_version] = weights
            return weights
        return None

    def _link(self, source: Path, policy_version: int, stamp: float) -> Weights:
        self._directory.mkdir(parents=True, exist_ok=True)  # whoever removed it
        target = self._directory / file_name(policy_version, stamp)
        place(source, target)
        return Weights(policy_version, target, stamp)

    async def _restore(self, policy_version: int) -> Weights | None:
        """A kept file or a checkpoint, as a file of our own."""
        async with self._lock:
            found = self._find(policy_version)  # by the one who held the lock
            if found is not None:
                return found
            kept = self._kept.all().get(policy_version)
            if kept is not None and kept.path is not None:
                with suppress(FileNotFoundError):  # no decision names it any more
                    self._restored[policy_version] = await self._copy(kept.path, kept)
                    return self._restored[policy_version]
            stamp = self.checkpoints().get(policy_version)
            if stamp is None:
                return None
            self._restored[policy_version] = await self._convert(policy_version, stamp)
            return self._restored[policy_version]

    async def _copy(self, source: Path, weights: Weights) -> Weights:
        """Placed in a folder that `forget` does not look into, then renamed."""
        building = self._building(weights.policy_version)
        building.mkdir(parents=True)
        await asyncio.to_thread(place, source, building / "model.safetensors")
        return self._adopt(building, weights.policy_version, weights.stamp)

    async def _convert(self, policy_version: int, stamp: float) -> Weights:
        """The weights of a checkpoint as one file, made by `hone export` in its own process."""
        assert self._run is not None
        building = self._building(policy_version)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve.cli", "export", str(self._run.path), str(building),
            "--version", str(policy_version),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, problem = await asyncio.wait_for(process.communicate(), EXPORT_TIMEOUT_S)
        except TimeoutError:
            raise StageError("endpoint", f"export of {policy_version} took too long") from None
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            last = problem.decode(errors="replace").strip().splitlines()[-1:]
            raise StageError("endpoint", f"policy@{policy_version} did not export: {last}")
        return self._adopt(building, policy_version, stamp)

    def _building(self, policy_version: int) -> Path:
        building = self._directory / f"building_{policy_version}"
        shutil.rmtree(building, ignore_errors=True)
        return building

    def _adopt(self, building: Path, policy_version: int, stamp: float) -> Weights:
        target = self._directory / file_name(policy_version, stamp)
        (building / "model.safetensors").replace(target)
        shutil.rmtree(building, ignore_errors=True)
        return Weights(policy_version, target, stamp)
