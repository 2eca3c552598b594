"""Packages against a lock file and against another node."""

from pathlib import Path

import numpy

from cluster import environment


def test_a_package_at_another_version_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text(
        f"# comment\nnumpy=={numpy.__version__}\nmsgspec==0.0.1 \\\n    --hash=sha256:00\n"
        "not-installed-here==1.0\n"
    )
    [line] = environment.lock_differences(lock)
    assert line.startswith("msgspec must be 0.0.1 (cpu.txt), got ")


def test_local_tags_do_not_count(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text(f"numpy=={numpy.__version__}+cpu\n")
    assert environment.lock_differences(lock) == []


def test_nodes_with_other_packages_differ() -> None:
    here = environment.versions()
    assert {"python", "ray", "torch", "numpy"} <= here.keys()
    assert environment.differences(here, dict(here)) == []
    there = here | {"torch": "0.1"}
    del there["numpy"]
    assert environment.differences(here, there) == [
        f"numpy {here['numpy']} here, missing there",
        f"torch {here['torch']} here, 0.1 there",
    ]


def test_this_environment_is_the_locked_one() -> None:
    root = Path(__file__).parents[2]
    assert environment.lock_differences(environment.lock_file(root)) == []
