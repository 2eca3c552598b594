"""The admin routes open runs by their plain name and nothing else."""

from pathlib import Path

import pytest

from cluster.run_dir import RunDir
from serve.admin_api import find_run
from serve.api_errors import ApiError


def test_a_run_is_opened_by_its_name(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "runs", "demo", "{}", exist_ok=False)
    (tmp_path / "config.yaml").write_text("{}")
    assert find_run(tmp_path / "runs", "demo").name == "demo"
    assert find_run(tmp_path / "runs", "latest").name == "demo"
    for name in ("..", ".", "", "a" * 300, "demo/../demo", "\0", "%2e%2e", "*", str(tmp_path)):
        with pytest.raises(ApiError) as refused:
            find_run(tmp_path / "runs", name)
        assert refused.value.status == 404
