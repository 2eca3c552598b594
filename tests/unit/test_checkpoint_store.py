"""The checkpoint store: a crash leaves the older checkpoints, damage is never loaded."""

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.checkpoint_store import CheckpointStore
from cluster.errors import StageError
from cluster.run_state import RunState


def state(step: int) -> RunState:
    return RunState(run_id="r", step=step, policy_version=step, config_hash="abc")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def save(store: CheckpointStore, step: int) -> Path:
    path = store.begin(step)
    (path / "shards").mkdir()
    (path / "shards" / "rank0.bin").write_bytes(bytes([step % 256]) * 4096)
    (path / "meta.json").write_text("{}")
    return store.commit(step, state(step))


def latest_step(store: CheckpointStore) -> int | None:
    latest = store.latest()
    return None if latest is None else latest[1].step


def test_committed_checkpoint_is_found(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.latest() is None
    assert store.steps() == []
    assert store.all() == []

    path = save(store, 10)
    assert path == tmp_path / "checkpoints" / "step_000010"
    assert store.latest() == (path, state(10))
    assert (path / "shards" / "rank0.bin").read_bytes() == b"\n" * 4096
    assert (path / "COMPLETE").is_file()


def test_only_the_newest_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(store, step)
    assert store.steps() == [3, 4, 5]
    assert [s.step for _, s in store.all()] == [3, 4, 5]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == [
        "step_000003",
        "step_000004",
        "step_000005",
    ]


def test_the_newest_is_kept_whatever_keep_says(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=0)
    save(store, 1)
    save(store, 2)
    assert store.steps() == [2]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_999, 1_000_000, 1_000_001):
        save(store, step)
    assert store.steps() == [1_000_000, 1_000_001]
    assert latest_step(store) == 1_000_001


def test_unfinished_directory_is_ignored_and_then_removed(
    store: CheckpointStore, tmp_path: Path
) -> None:
    save(store, 1)
    unfinished = store.begin(2)
    (unfinished / "rank0.bin").write_bytes(b"half")
    assert latest_step(store) == 1
    assert store.steps() == [1]

    again = store.begin(2)
    assert list(again.iterdir()) == []
    store.begin(3)
    assert not again.exists()


@pytest.mark.parametrize("step", [4, 5])
def test_a_checkpoint_must_come_after_the_newest(store: CheckpointStore, step: int) -> None:
    save(store, 5)
    with pytest.raises(StageError, match=f"step {step}, newest 5"):
        store.begin(step)


def test_commit_needs_begin_and_the_state_of_that_step(store: CheckpointStore) -> None:
    with pytest.raises(StageError, match=r"commit\(1\) must follow begin\(1\)"):
        store.commit(1, state(1))
    store.begin(1)
    with pytest.raises(StageError, match="got one of step 2"):
        store.commit(1, state(2))
    assert store.steps() == []


NAMES = ["shards/rank0.bin", "meta.json", "state.json", "COMPLETE"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_newest_is_set_aside_and_the_older_one_taken(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    older, newest = save(store, 1), save(store, 2)
    file = newest / name
    data = file.read_bytes()
    middle = len(data) // 2
    if damage == "flip":
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "cut":
        file.write_bytes(data[:middle])
    else:
        file.unlink()

    assert [s.step for _, s in store.all()] == [1]
    assert newest.exists(), "all() must change nothing"
    assert store.latest() == (older, state(1))
    assert not newest.exists()
    assert newest.with_suffix(".corrupt").is_dir()
    assert "step_000002" in caplog.text
    assert store.latest() == (older, state(1))


def test_step_can_be_saved_again_after_its_checkpoint_was_set_aside(
    store: CheckpointStore, tmp_path: Path
) -> None:
    save(store, 1)
    for _ in range(2):
        (save(store, 2) / "COMPLETE").unlink()
        assert latest_step(store) == 1
    assert save(store, 2).is_dir()
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert {"step_000002.corrupt", "step_000002.corrupt2", "step_000002"} <= names


def test_every_file_and_directory_is_on_disk_before_the_name_appears(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(target.relative_to(tmp_path / "checkpoints").as_posix())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    save(store, 1)
    files = {"shards/rank0.bin", "meta.json", "state.json", "COMPLETE", "shards"}
    assert set(synced[:-2]) == {f".writing-0/step_000001/{name}" for name in files}
    assert synced[-2:] == [".writing-0/step_000001", "."]


class Crash(BaseException):
    """Ends a commit where it stands, as kill -9 would: nothing cleans up."""


SYSTEM_CALLS = [(os, "fsync"), (os, "rename"), (Path, "rename"), (shutil, "rmtree")]


def crash_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Let the `call`-th system call that changes the disk raise `Crash` instead of running."""
    count = 0
    for owner, name in SYSTEM_CALLS:
        original = getattr(owner, name)

        def counted(*arguments: object, original: object = original, **settings: object) -> object:
            nonlocal count
            count += 1
            if count == call:
                raise Crash
            assert callable(original)
            return original(*arguments, **settings)

        patch.setattr(owner, name, counted)


def test_crash_at_every_system_call_of_a_commit_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[int | None] = []
    for call in range(1, 100):
        directory = tmp_path / str(call)
        store = CheckpointStore(directory, keep=1)
        save(store, 1)
        is_done = True
        with monkeypatch.context() as patch:
            crash_at(call, patch)
            try:
                save(store, 2)
            except Crash:
                is_done = False
        survivor = CheckpointStore(directory, keep=1)
        outcomes.append(latest_step(survivor))
        assert save(survivor, 3).is_dir()
        assert survivor.steps() == [3]
        assert [p.name for p in directory.glob("step_*")] == ["step_000003"]
        if is_done:
            break
    num_before = outcomes.count(1)
    assert num_before >= 8
    assert outcomes == [1] * num_before + [2] * (len(outcomes) - num_before)
    assert len(outcomes) - num_before >= 3


def test_full_disk_is_an_error_that_leaves_the_older_ones(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StageError, match=r"checkpoint: OSError.*No space left"):
            save(store, 2)
    assert latest_step(store) == 1


def test_a_successor_takes_over_while_the_old_ranks_still_write(tmp_path: Path) -> None:
    is_over = threading.Event()
    for epoch in range(20):
        old = CheckpointStore(tmp_path, keep=3)
        old.take_over(2 * epoch)
        draft = old.begin(4)
        is_over.clear()

        def write(folder: Path = draft) -> None:
            for number in itertools.takewhile(lambda _: not is_over.is_set(), itertools.count()):
                with suppress(OSError):
                    (folder / str(number)).write_bytes(b"late")

        rank = threading.Thread(target=write)
        rank.start()
        try:
            CheckpointStore(tmp_path, keep=3).take_over(2 * epoch + 1)
        finally:
            is_over.set()
            rank.join()
        assert [path.name for path in tmp_path.iterdir()] == [f".writing-{2 * epoch + 1}"]


def test_what_is_abandoned_while_it_is_committed_is_not_published(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each system call of the commit: it is published whole, or not at all."""
    save(store, 1)
    fates: list[bool] = []
    for number in itertools.count():
        calls = itertools.count()

        def sync(_descriptor: int, calls: Iterator[int] = calls, number: int = number) -> None:
            if next(calls) == number:
                store.abandon(number + 2)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            with suppress(StageError):
                save(store, number + 2)
        found = store.latest()
        assert found is not None
        is_published = found[1].step == number + 2
        fates.append(is_published)
        if next(calls) <= number:
            break
    assert fates.count(False) > 3
    assert is_published


def test_a_checkpoint_that_cannot_be_removed_is_kept_and_the_newer_one_is_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "step_000001":
            raise PermissionError(errno.EACCES, "it is open elsewhere")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    save(store, 2)
    assert store.steps() == [1, 2]
    assert "it is open elsewhere" in caplog.text
    monkeypatch.undo()
    save(store, 3)
    assert store.steps() == [3]
