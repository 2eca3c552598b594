"""What a launcher leaves where no controller could say that the run failed."""

from pathlib import Path

import pytest

from actors import train
from cluster import config_file, status
from cluster.config_file import parse
from cluster.errors import StageError
from cluster.run_dir import RunDir
from tests.conftest import TINY


def test_a_start_that_fails_is_in_status_and_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(TINY, "test")
    run = RunDir.create(tmp_path, "demo", config_file.dump(config), exist_ok=True)

    def no_node(*_arguments: object) -> None:
        raise StageError("ray", "no node within 30 s")

    monkeypatch.setattr(train, "ray_session", no_node)
    with pytest.raises(StageError, match="no node"):
        train.run(config, run_dir=run, address="local")
    known = status.read(run.path)
    assert known is not None
    assert (known.phase, known.error) == ("failed", "ray: no node within 30 s")
    assert [event.kind for event in run.read_events()] == ["run_failed"]
