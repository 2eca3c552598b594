"""A run leaves no process and no weights behind, and the tests that say so would see them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from actors import train
from cluster import config_file
from cluster.config import Config
from cluster.embedded_redis import EmbeddedRedis
from cluster.redis_client import URL_VARIABLE
from cluster.run_dir import RunDir
from cluster.run_lock import sole_launcher
from tests.conftest import TINY
from tests.processes import KINDS, kinds, processes_of

ROOT = Path(__file__).parents[2]


@ray.remote(num_cpus=0)
class Parent:
    """An actor with an engine of the same kind as vLLM's: another process, renamed."""

    def start_engine(self) -> int:
        program = (
            "import setproctitle, time\n"
            "setproctitle.setproctitle('VLLM::EngineCore')\n"
            "print(flush=True); time.sleep(60)"
        )
        engine = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
        )
        assert engine.stdout is not None
        engine.stdout.readline()
        return engine.pid


def test_every_kind_of_process_of_a_run_is_seen_and_none_is_left(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir.create(tmp_path / "runs", "demo", "run: {}\n", exist_ok=False)
    assert processes_of(tmp_path) == {}
    with EmbeddedRedis(run.redis) as server, train.ray_session(tiny_config, run, "local"):
        parent = Parent.remote()  # ends with its handle
        engine = ray.get(parent.start_engine.remote(), timeout=60)
        seen = processes_of(tmp_path)
        assert {server.pid, engine} <= seen.keys()
        assert kinds(seen) == KINDS.keys()
    assert processes_of(tmp_path) == {}


def test_a_run_that_a_cluster_refuses_leaves_no_shared_weights(
    tmp_path: Path, redis_url: str, local_ray: None
) -> None:
    place = tmp_path / "config.yaml"
    tiny = config_file.parse(TINY | {"learner": {"world_size": 64}}, "a test")
    place.write_text(config_file.dump(tiny))
    runs = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, "-m", "actors.train", str(place), f"run.dir={runs}", "run.name=demo"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {
            URL_VARIABLE: redis_url,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "learner" in done.stderr
    assert (runs / "demo" / "config.yaml").is_file()
    assert not (runs / "demo" / "weights").exists()


def test_a_second_launcher_of_a_run_touches_nothing(tmp_path: Path, redis_url: str) -> None:
    place = tmp_path / "config.yaml"
    text = config_file.dump(config_file.parse(TINY, "a test"))
    place.write_text(text)
    live = RunDir.create(tmp_path / "runs", "demo", text, exist_ok=False)
    live.weights.mkdir(parents=True, exist_ok=True)
    version = live.weights / "policy_00000001.safetensors"
    version.write_bytes(b"in use")
    before = sorted(path.name for path in live.path.rglob("*"))
    try:
        with sole_launcher(live):
            done = subprocess.run(
                [sys.executable, "-m", "actors.train", str(place), f"run.dir={live.path.parent}",
                 "run.name=demo"],
                cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
                env=os.environ | {URL_VARIABLE: redis_url},
            )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert "is being trained already" in done.stderr
        assert version.read_bytes() == b"in use"
        assert sorted(path.name for path in live.path.rglob("*")) == sorted([*before, "lock"])
    finally:
        shutil.rmtree(live.weights)
