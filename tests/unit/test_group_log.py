"""The book of groups keeps every line through a full disk, in its order."""

import logging
import resource
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from cluster import group_log
from cluster.errors import StageError
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "booked", "", exist_ok=False)


def sampled(group_id: str) -> GroupLine:
    return GroupLine(group_id=group_id, fate=Fate.SAMPLED, rewards=[0.5, None])


def ids(run: RunDir) -> list[str]:
    return [line.group_id for line in GroupLog(run).read()]


def test_lines_wait_until_the_disk_has_room(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    book, file = GroupLog(run), run.path / "groups.jsonl"
    for _ in range(2):
        file.symlink_to("/dev/full")
        with caplog.at_level(logging.WARNING):
            book.append(sampled("a"))
            book.dropped("a", "uniform")
        file.unlink()
        book.append(sampled("b"))
        lines = GroupLog(run).read()
        assert [(line.group_id, line.fate) for line in lines] == [
            ("a", Fate.SAMPLED), ("a", Fate.DROPPED), ("b", Fate.SAMPLED),
        ]  # fmt: skip
        assert [line.time for line in lines] == sorted(line.time for line in lines)
        file.unlink()
    warnings = [r.getMessage() for r in caplog.records if "wait in memory" in r.getMessage()]
    assert len(warnings) == 2, "one each time"
    assert "No space left" in warnings[0]


def test_a_line_that_fitted_only_in_part_is_written_again(run: RunDir) -> None:
    book, file = GroupLog(run), run.path / "groups.jsonl"
    book.append(sampled("a"))
    size = file.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        book.append(sampled("b"))
        book.append(sampled("c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.stat().st_size == size + 10
    assert ids(run) == ["a"]
    book.close()
    assert ids(run) == ["a", "b", "c"]


def test_who_is_undecided_is_known_without_a_long_book_in_memory(run: RunDir) -> None:
    book, file = GroupLog(run), run.path / "groups.jsonl"
    assert book.undecided() == set()
    long = GroupLine(group_id="a", fate=Fate.SAMPLED, arms=["plain"] * 200)
    for group_id in ("a", "b", "c", "again"):
        book.append(sampled(group_id))
    with file.open("ab") as lines:
        lines.write((msgspec.json.encode(long) + b"\n") * 1000)
    book.dropped("b", "uniform")
    book.dropped("again", "lost_weights")
    book.append(GroupLine(group_id="again", fate=Fate.HELD))
    with file.open("ab") as lines:
        lines.write(b'{"group_id": "torn"\n\n{"group_id": "cut", "fate": "sampled"}')
    tracemalloc.start()
    try:
        assert book.undecided() == {"a", "c", "again"}
        assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_a_disk_that_stays_full_ends_the_run_by_its_name(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(group_log, "MAX_WAITING", 3)
    book, file = GroupLog(run), run.path / "groups.jsonl"
    file.symlink_to("/dev/full")
    for group_id in "abc":
        book.append(sampled(group_id))
    with pytest.raises(StageError, match=r"group log: the disk of .*groups\.jsonl has been full"):
        book.append(sampled("d"))
    with caplog.at_level(logging.WARNING):
        book.close()
    assert "lacks its last 4 lines" in caplog.text
    file.unlink()
    book.close()
    assert ids(run) == list("abcd")


def test_another_fault_of_the_file_is_an_error_of_its_stage_but_not_at_the_end(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    book = GroupLog(run)
    (run.path / "groups.jsonl").mkdir()
    with pytest.raises(StageError, match="group log: IsADirectoryError"):
        book.append(sampled("a"))
    with caplog.at_level(logging.WARNING):
        book.close()
    assert "Is a directory" in caplog.text
    assert "lacks its last 1 lines" in caplog.text
