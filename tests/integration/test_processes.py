"""A run leaves no process behind, and the tests that say so would see one."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from actors import train
from cluster.config import Config
from cluster.embedded_redis import EmbeddedRedis
from cluster.run_dir import RunDir
from tests.processes import KINDS, kinds, processes_of


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
        engine = ray.get(Parent.remote().start_engine.remote(), timeout=60)
        seen = processes_of(tmp_path)
        assert {server.pid, engine} <= seen.keys()
        assert kinds(seen) == KINDS.keys()
    assert processes_of(tmp_path) == {}
