"""What `hone serve` refuses before anything starts, and the commands around keys."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from serve.api_keys import KeyStore
from serve.cli import app
from serve.endpoint_settings import Door, check, resolve, url_file, url_of


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "some-model"
    folder.mkdir()
    described = {"dtype": "bfloat16", "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def test_a_model_directory_gets_a_home_beside_the_runs(model: str, tmp_path: Path) -> None:
    settings = resolve(model, overrides=["limits.running=7"], runs=tmp_path / "runs")
    assert settings.home == tmp_path / "runs" / "serve-some-model"
    assert (settings.engine.dtype, settings.engine.context_length) == ("bfloat16", 4096)
    assert (settings.engine.max_num_seqs, settings.has_run) == (7, False)


@pytest.mark.parametrize(
    "override", ["limits.runing=1", "limits.running=many", "other.x=1", "limits", "guards=1"]
)
def test_a_wrong_override_names_itself(model: str, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].split(".")[0]):
        resolve(model, overrides=[override], runs=tmp_path)


def test_a_door_without_keys_stays_shut(model: str, tmp_path: Path) -> None:
    closed = resolve(model, runs=tmp_path)
    with pytest.raises(ConfigError, match="hone keys create"):
        check(closed, Door())
    opened = resolve(model, runs=tmp_path, is_open=True)
    check(opened, Door())
    with pytest.raises(ConfigError, match="loopback"):
        check(opened, Door(host="0.0.0.0"))
    KeyStore(closed.keys).create("a", ["query"])
    check(closed, Door(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="--tls-key and --tls-cert"):
        check(closed, Door(tls_key="k.pem"))


def test_the_endpoint_of_a_run_is_found(tmp_path: Path) -> None:
    assert url_of(None, tmp_path) == "http://127.0.0.1:8000"
    run = RunDir.create(tmp_path, "demo", "{}", exist_ok=False)
    with pytest.raises(ConfigError, match="no endpoint serves this run"):
        url_of("demo", tmp_path)
    url_file(run.path).parent.mkdir()
    url_file(run.path).write_text("http://127.0.0.1:8123")
    assert url_of("demo", tmp_path) == url_of(None, tmp_path) == "http://127.0.0.1:8123"


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    run, file = CliRunner().invoke, str(tmp_path / "keys.json")
    made = run(app, ["keys", "create", "alice", "--scope", "admin", "--keys", file])
    key = KeyStore(Path(file)).find(made.output.strip())
    assert key is not None
    assert key.scopes == ["admin"]
    listed = run(app, ["keys", "list", "--keys", file]).output
    assert "alice  scopes admin" in listed
    assert made.output.strip() not in listed
    run(app, ["keys", "revoke", "alice", "--keys", file])
    assert run(app, ["keys", "list", "--keys", file]).output == ""
