"""A Ray of one's own on a busy machine: the node that comes up too late is tried for once more."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from actors.connection import NICENESS, NUM_TRIES, own_ray
from cluster.errors import StageError

LATE = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize("num_late", [0, 1, NUM_TRIES])
def test_a_node_that_comes_late_is_tried_for_again(
    monkeypatch: pytest.MonkeyPatch, num_late: int
) -> None:
    folders: list[Path] = []

    def init(*, _temp_dir: str, _system_config: dict[str, int], **_settings: Any) -> None:
        assert _system_config == {"worker_niceness": NICENESS}
        folders.append(Path(_temp_dir))
        assert folders[-1].is_dir()
        if len(folders) <= num_late:
            raise Exception(LATE)

    monkeypatch.setattr(ray, "init", init)
    if num_late == NUM_TRIES:
        with pytest.raises(StageError, match="too busy"), own_ray(1, {}):
            pytest.fail("no Ray came up")
    else:
        with own_ray(1, {}):
            assert len(folders) == num_late + 1
    assert not folders[0].exists()


def test_another_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_settings: Any) -> None:
        raise ValueError("no such setting")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="no such setting"), own_ray(1, {}):
        pytest.fail("no Ray came up")


def test_the_folder_is_seen_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **_settings: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    with own_ray(1, {}, lambda folder: seen.append(folder.is_dir())):
        assert not seen
    assert seen == [True]


def test_temporary_files_of_workers_are_in_one_folder_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that is killed, too: nobody else would remove them. It lies where the user's do."""

    @ray.remote(max_retries=0)
    def leave_a_file() -> None:
        tempfile.mkstemp()
        os.kill(os.getpid(), signal.SIGKILL)

    @ray.remote
    def place() -> str:
        return tempfile.gettempdir()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with own_ray(1, {}):
        with pytest.raises(WorkerCrashedError):
            ray.get(leave_a_file.remote(), timeout=60)
        scratch = Path(ray.get(place.remote(), timeout=60))
        assert len(list(scratch.glob("tmp*"))) == 1
        assert scratch.parent == tmp_path
    assert not scratch.exists()
