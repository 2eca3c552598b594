"""The Ray that `hone train` starts for itself: nobody else reaches it, nobody gets in."""

from collections.abc import Callable
from pathlib import Path

import psutil
import ray

from actors import train
from cluster.config import Config
from cluster.run_dir import RunDir
from tests.doors import doors


def test_a_run_of_ones_own_listens_on_loopback_and_refuses_strangers(
    tiny_config: Config, tmp_path: Path, record_property: Callable[[str, float], None]
) -> None:
    run = RunDir.create(tmp_path, "demo", "run: {}\n", exist_ok=False)
    with train.ray_session(tiny_config, run, "local"):
        assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote(), timeout=60) == 1
        children = psutil.Process().children(recursive=True)
        found = doors(child.pid for child in children)
    listing = "\n".join(map(str, found))
    assert len(found) >= 5, listing
    assert all(door.is_local for door in found), listing
    assert {door.outcome for door in found} <= {"refused", "metrics"}, listing
    record_property("local_ports", len(found))
