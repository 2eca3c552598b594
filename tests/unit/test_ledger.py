"""The ledger: committed steps survive, torn lines do not count, nothing rolled back is lost."""

import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import StageError, WireError
from cluster.ledger import Ledger
from cluster.types import StepRecord


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        policy_version=step,
        group_ids=[f"g{step}a", f"g{step}b"],
        policy_versions=[step - 1, step - 1],
        reward_versions={"correct": ["v1"]},
        num_loss_tokens=100 * step,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def write(path: Path, *steps: int) -> None:
    ledger = Ledger(path)
    for step in steps:
        ledger.commit(record(step))


def steps(path: Path) -> list[int]:
    return [r.step for r in Ledger(path).records()]


def test_records_come_back_in_another_process_view(path: Path) -> None:
    assert Ledger(path).records() == []
    write(path, 1, 2)
    write(path, 3)
    assert Ledger(path).records() == [record(1), record(2), record(3)]


@pytest.mark.parametrize("num_bytes", [1, 2, 20, 10_000])
def test_torn_last_line_does_not_count_and_does_not_join_the_next(
    path: Path, num_bytes: int
) -> None:
    write(path, 1, 2)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[: max(second, len(whole) - num_bytes)])
    torn = path.read_bytes()

    assert steps(path) == [1]
    assert path.read_bytes() == torn, "reading must change nothing"
    write(path, 2, 3)
    assert Ledger(path).records() == [record(1), record(2), record(3)]


@contextmanager
def room(path: Path, num_bytes: int) -> Generator[None]:
    """A disk that takes so much more of `path`, and no longer file at all."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [0, 10])
def test_a_full_disk_is_named_and_what_it_took_of_the_line_does_not_count(
    path: Path, num_bytes: int
) -> None:
    ledger = Ledger(path)
    ledger.commit(record(1))
    size = path.stat().st_size
    with room(path, num_bytes), pytest.raises(StageError) as caught:
        ledger.commit(record(2))
    assert str(caught.value).startswith("ledger: step 2 could not be written: [Errno 27]")
    assert "free the disk and go on with --resume" in str(caught.value)
    assert path.stat().st_size == size + num_bytes
    assert steps(path) == [1]
    assert Ledger(path).truncate_after(1) == []
    assert path.stat().st_size == size
    ledger.commit(record(2))
    assert Ledger(path).records() == [record(1), record(2)]


def test_a_disk_that_is_full_in_a_roll_back_loses_no_record(path: Path) -> None:
    write(path, 1, 2, 3)
    with (
        room(path, -path.stat().st_size + 10),
        pytest.raises(StageError, match="a roll-back to step 1 could not be written"),
    ):
        Ledger(path).truncate_after(1)
    assert steps(path) == [1, 2, 3]
    assert Ledger(path).truncate_after(1) == [record(2), record(3)]
    assert steps(path) == [1]
    assert Ledger(Ledger(path).rolled_back_path).records() == [record(2), record(3)]


def test_damaged_line_in_the_middle_is_an_error_with_its_number(path: Path) -> None:
    write(path, 1, 2, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:10] + b"\n" + lines[2])
    with pytest.raises(WireError, match=r"ledger\.jsonl:2: not a step record"):
        Ledger(path).records()


@pytest.mark.parametrize("step", [1, 2])
def test_steps_must_increase(path: Path, step: int) -> None:
    write(path, 1, 2)
    with pytest.raises(StageError, match=f"step {step} came after step 2"):
        Ledger(path).commit(record(step))
    assert steps(path) == [1, 2]


def test_commit_reaches_the_disk_before_it_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, int]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.stat().st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write(path, 1)
    size = path.stat().st_size
    assert synced == [(path.parent, 0), (path, size)]
    write(path, 2)
    assert synced[2:] == [(path, path.stat().st_size)]


def test_truncate_moves_later_steps_aside(path: Path) -> None:
    write(path, 1, 2, 3, 4)
    ledger = Ledger(path)

    assert ledger.truncate_after(2) == [record(3), record(4)]
    assert steps(path) == [1, 2]
    assert ledger.rolled_back_path.name == "ledger.rolled_back.jsonl"
    assert steps(ledger.rolled_back_path) == [3, 4]

    assert ledger.truncate_after(2) == []
    ledger.commit(record(3))
    assert steps(path) == [1, 2, 3]
    assert ledger.truncate_after(0) == [record(1), record(2), record(3)]
    assert steps(path) == []
    assert steps(ledger.rolled_back_path) == [3, 4, 1, 2, 3]


def test_truncate_of_a_torn_ledger_leaves_it_writable(path: Path) -> None:
    write(path, 1, 2)
    with path.open("ab") as file:
        file.write(b'{"step":3,"poli')

    ledger = Ledger(path)
    assert ledger.truncate_after(2) == []
    ledger.commit(record(3))
    assert steps(path) == [1, 2, 3]


def test_crash_while_truncating_loses_no_record(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, 1, 2, 3)

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            Ledger(path).truncate_after(1)
    assert steps(path) == [1, 2, 3]
    assert steps(Ledger(path).rolled_back_path) == [2, 3]
    assert Ledger(path).truncate_after(1) == [record(2), record(3)]
    assert steps(path) == [1]
