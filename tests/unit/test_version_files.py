"""Which file a version comes from, and how long it stays: plain files stand for weights."""

import shutil
from pathlib import Path

import pytest

from cluster import published
from cluster.errors import StageError
from cluster.run_dir import RunDir
from serve import weight_library
from serve.api_errors import ApiError
from serve.kept_versions import KeptVersions, Weights
from serve.weight_library import WeightLibrary


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "demo", "{}", exist_ok=False)
    run.share_weights()
    return run


def publish(run: RunDir, version: int, text: str = "") -> None:
    """As a trainer does: a whole file, then the announcement; its last two files stay."""
    path = run.weights / f"policy_{version:08d}.safetensors"
    path.with_suffix(".tmp").write_text(text or str(version))
    path.with_suffix(".tmp").replace(path)
    published.announce(run.weights, version, path)
    for old in sorted(run.weights.glob("policy_*.safetensors"))[:-2]:
        old.unlink()


def replica(run: RunDir, name: str) -> WeightLibrary:
    kept = KeptVersions(run.path / "endpoint" / "versions")
    return WeightLibrary(run, run.path.parent / name, kept)


def text_of(weights: Weights) -> str:
    assert weights.path is not None
    return weights.path.read_text()


async def test_a_version_published_just_now_is_found(run: RunDir) -> None:
    """Nothing has looked at the run in between."""
    library = replica(run, "a")
    publish(run, 1)
    assert text_of(await library.get(1)) == "1"
    publish(run, 2)
    publish(run, 3)
    assert text_of(await library.get(2)) == "2"
    newest = library.newest()
    assert newest is not None
    assert newest.policy_version == 3
    with pytest.raises(ApiError, match=r"known: 1, 2, 3"):
        await library.get(4)


async def test_a_folder_that_someone_removed_is_made_again(run: RunDir) -> None:
    library = replica(run, "a")
    publish(run, 1)
    library.newest()
    shutil.rmtree(run.path.parent / "a")
    publish(run, 2)
    newest = library.newest()
    assert newest is not None
    assert text_of(newest) == "2"


def test_what_cannot_be_held_though_it_is_there_is_told(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_source: Path, _target: Path) -> None:
        raise FileNotFoundError

    library = replica(run, "a")
    publish(run, 1)
    monkeypatch.setattr(weight_library, "place", fails)
    with pytest.raises(FileNotFoundError):
        library.newest()
    for path in run.weights.glob("policy_*"):
        path.unlink()
    assert library.newest() is None


async def test_what_was_fixed_is_found_by_the_next_replica(run: RunDir) -> None:
    first = replica(run, "a")
    publish(run, 1)
    fixed = await first.get(1)
    await first.store(fixed)
    for version in (2, 3, 4):
        publish(run, version)
    shutil.rmtree(run.weights)  # the run has ended
    second = replica(run, "b")
    found = await second.get(1)
    assert (text_of(found), found) == ("1", fixed)
    assert [(v.policy_version, v.source) for v in second.versions()] == [(1, "kept")]
    await second.keep({1}, [found])
    assert [*KeptVersions(run.path / "endpoint" / "versions").all()] == [1]
    await second.keep(set(), [found])
    assert list((run.path / "endpoint" / "versions").iterdir()) == []
    assert text_of(await second.get(1)) == "1"
    with pytest.raises(ApiError):
        await replica(run, "c").get(1)


async def test_a_fixed_version_that_nobody_kept_is_kept_from_an_engine(run: RunDir) -> None:
    library = replica(run, "a")
    for version in (1, 2):
        publish(run, version)
        library.newest()
    loaded = [await library.get(1), await library.get(2)]
    await library.keep({1}, loaded)
    kept = KeptVersions(run.path / "endpoint" / "versions").all()
    assert {version: text_of(weights) for version, weights in kept.items()} == {1: "1"}


async def test_a_number_used_again_replaces_what_was_kept(run: RunDir) -> None:
    library = replica(run, "a")
    publish(run, 5, "before")
    await library.store(await library.get(5))
    publish(run, 5, "again")
    newest = library.newest()
    assert newest is not None
    assert newest != Weights(5, newest.path, 0.0)
    await library.store(newest)
    kept = KeptVersions(run.path / "endpoint" / "versions").all()
    assert {version: text_of(weights) for version, weights in kept.items()} == {5: "again"}


async def test_a_file_on_its_way_to_an_engine_stays(run: RunDir) -> None:
    library = replica(run, "a")
    publish(run, 1)
    weights = await library.get(1)
    with library.using(weights):
        for version in range(2, 9):
            publish(run, version)
            library.newest()
            library.forget(set(), [])
        assert text_of(weights) == "1"
    library.forget(set(), [weights])
    assert text_of(weights) == "1"
    library.forget(set(), [])
    assert weights.path is not None
    assert not weights.path.exists()
    held = sorted(path.read_text() for path in (run.path.parent / "a").iterdir())
    assert held == ["6", "7", "8"]


async def test_files_of_steps_that_were_taken_back_stay_only_while_loaded(run: RunDir) -> None:
    library = replica(run, "a")
    publish(run, 7)
    loaded = await library.get(7)
    publish(run, 6, "again")
    library.newest()
    library.forget(set(), [loaded])
    assert text_of(loaded) == "7"
    with pytest.raises(ApiError):
        await library.get(7)
    publish(run, 7, "again")
    assert text_of(await library.get(7)) == "again"
    assert text_of(loaded) == "7"
    library.forget(set(), [])
    assert loaded.path is not None
    assert not loaded.path.exists()


async def test_a_file_that_someone_removed_is_looked_for_again(run: RunDir) -> None:
    library = replica(run, "a")
    publish(run, 1)
    weights = await library.get(1)
    assert weights.path is not None
    weights.path.unlink()
    publish(run, 2)
    assert text_of(await library.get(1)) == "1"


async def test_a_copy_that_cannot_be_kept_says_so(run: RunDir) -> None:
    library = replica(run, "a")
    publish(run, 1)
    weights = await library.get(1)
    (run.path / "endpoint").mkdir()
    (run.path / "endpoint" / "versions").write_text("in the way")
    with pytest.raises(StageError, match="endpoint: FileExistsError"):
        await library.store(weights)
