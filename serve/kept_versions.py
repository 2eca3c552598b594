"""Weights that a decision fixed, on disk for as long as it stands.

Invariant: a promoted version or a canary can be loaded again after every replica has ended, though
the run deletes its published files. One file a version; a reader sees a whole one or none. Bounded
by the release state: the stable version and the canary.
"""

import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import StageError

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Weights:
    """One loadable version, whichever file holds it. `path` None means the weights the engine was
    started with. `stamp` (unix seconds of the announcement or of the checkpoint) tells two sets of
    weights of one number apart: a run that goes back uses its numbers again.
    """

    policy_version: int
    path: Path | None = field(compare=False)
    stamp: float


def file_name(policy_version: int, stamp: float) -> str:
    return f"{policy_version:08d}_{stamp!r}{SUFFIX}"


class KeptVersions:
    """Example: `kept.store(weights); kept.all()[7].path; kept.drop_all_but({7})`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def all(self) -> dict[int, Weights]:
        """By version. Another replica may remove a file at any time."""
        found: dict[int, Weights] = {}
        for path in self._directory.glob(f"*{SUFFIX}"):
            version, _, stamp = path.name.removesuffix(SUFFIX).partition("_")
            found[int(version)] = Weights(int(version), path, float(stamp))
        return found

    def store(self, weights: Weights) -> None:
        """Keep `weights`, in place of others of the same number. Copies where it cannot link: use a
        thread. Raises as `place`.
        """
        if weights.path is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        target = self._directory / file_name(weights.policy_version, weights.stamp)
        if not target.exists():
            place(weights.path, target)
        for other in self._directory.glob(f"{weights.policy_version:08d}_*{SUFFIX}"):
            if other != target:
                other.unlink(missing_ok=True)

    def drop_all_but(self, versions: set[int]) -> None:
        for version, weights in self.all().items():
            if version not in versions and weights.path is not None:
                weights.path.unlink(missing_ok=True)


def place(source: Path, target: Path) -> None:
    """`target` becomes a hard link to `source`, or a copy on another file system; whole or not at
    all.

    Raises `FileNotFoundError` when `source` is gone, `StageError` when there is no room.
    """
    temporary = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StageError(
            "endpoint", f"cannot put weights into {target.parent}: {error.strerror}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
