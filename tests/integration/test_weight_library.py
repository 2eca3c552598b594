"""Versions that can be loaded: published files are held, checkpoints are converted on demand."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import published
from cluster.config import Config
from cluster.run_dir import RunDir
from serve.api_errors import ApiError
from serve.kept_versions import KeptVersions
from serve.weight_check import check_file
from serve.weight_library import WeightLibrary
from tests.endpoint_cases import make_run, publish
from tests.learner_cases import assert_same_weights, make_run_with_checkpoints


@pytest.fixture
def run(tiny_config: Config, tiny_policy_dir: Path, tmp_path: Path) -> RunDir:
    return make_run(tiny_config, tiny_policy_dir, tmp_path / "runs")


def library_of(run: RunDir, directory: Path) -> WeightLibrary:
    return WeightLibrary(run, directory, KeptVersions(run.path / "endpoint" / "versions"))


async def test_a_published_file_is_held_after_the_run_deleted_it(
    run: RunDir, tmp_path: Path
) -> None:
    library = library_of(run, tmp_path / "held")
    assert library.newest() is None
    first = load_file(publish(run, 1))
    for version in range(1, 7):
        publish(run, version)
        newest = library.newest()
        assert newest is not None
        assert newest.policy_version == version
        library.forget({1}, [])
    held = (await library.get(1)).path
    shutil.rmtree(run.weights)
    assert held is not None
    assert all(torch.equal(first[name], tensor) for name, tensor in load_file(held).items())
    assert [v.policy_version for v in library.versions()] == [1, 4, 5, 6]
    assert library.newest() is not None
    with pytest.raises(ApiError, match=r"known: 1, 4, 5, 6") as refused:
        await library.get(2)
    assert refused.value.status == 404


async def test_a_run_that_went_back_takes_its_later_versions_with_it(
    run: RunDir, tmp_path: Path
) -> None:
    library = library_of(run, tmp_path / "held")
    for version in (5, 6, 7):
        publish(run, version)
        library.newest()
    for path in run.weights.glob("policy_*"):
        path.unlink()
    publish(run, 6, scale=0.5)
    newest = library.newest()
    assert newest is not None
    assert newest.policy_version == 6
    assert [v.policy_version for v in library.versions()] == [5, 6]


def test_an_announced_file_that_is_gone_changes_nothing(run: RunDir, tmp_path: Path) -> None:
    library = library_of(run, tmp_path / "held")
    publish(run, 1)
    before = library.newest()
    published.announce(run.weights, 2, run.weights / "policy_00000002.safetensors")
    assert library.newest() == before


def test_a_file_is_checked_before_an_engine_sees_it(run: RunDir, tmp_path: Path) -> None:
    good = publish(run, 1)
    assert check_file(good, run.policy) == ""
    tensors = load_file(good)
    name = next(iter(tensors))
    bad = tmp_path / "bad.safetensors"
    cases = {
        "differ": {key: tensor for key, tensor in tensors.items() if key != name},
        "tensors differ": tensors | {name: tensors[name][:-1].contiguous()},
        "not finite": tensors | {name: torch.full_like(tensors[name], torch.inf)},
    }
    for reason, content in cases.items():
        save_file(content, bad)
        assert reason in check_file(bad, run.policy)
    bad.write_bytes(good.read_bytes()[:-100])
    assert "not a safetensors file" in check_file(bad, run.policy)
    bad.write_bytes(b"\xff" * 64)
    assert "not a safetensors file" in check_file(bad, run.policy)
    bad.unlink()
    with pytest.raises(FileNotFoundError):
        check_file(bad, run.policy)


async def test_a_pinned_version_comes_from_its_checkpoint(tmp_path: Path) -> None:
    run = make_run_with_checkpoints(tmp_path)
    library = library_of(run, tmp_path / "held")
    assert max(library.checkpoints()) == 2
    weights = await library.get(1)
    assert weights.path is not None
    assert_same_weights(weights.path, tmp_path / "version_1.safetensors", 0)
    assert check_file(weights.path, run.policy) == ""
    assert (await library.get(1)) is weights
