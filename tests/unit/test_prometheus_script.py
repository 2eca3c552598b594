"""`scripts/prometheus` unpacks Debian's package once, installs nothing, and says what it lacks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prometheus"
# Stands for the archive: "downloads" a package that dpkg-deb has really built.
APT_GET = """#!/bin/sh
[ "$1" = download ] || exit 9
mkdir -p made/DEBIAN made/usr/bin made/usr/share
printf 'Package: prometheus\\nVersion: 1\\nArchitecture: all\\nMaintainer: x\\nDescription: x\\n' \\
  >made/DEBIAN/control
for name in prometheus promtool; do echo '#!/bin/sh' >made/usr/bin/$name; done
chmod +x made/usr/bin/*
touch made/usr/share/much
dpkg-deb --build made prometheus_1_all.deb
"""


def fetch(cache: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT], capture_output=True, text=True, timeout=60, check=False,
        env={"XDG_CACHE_HOME": str(cache), "PATH": path},
    )  # fmt: skip


def test_without_apt_it_says_what_is_missing(tmp_path: Path) -> None:
    done = fetch(tmp_path, str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line == "error: without apt-get Debian's package prometheus cannot be had"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian")
def test_both_programs_are_unpacked_once_and_nothing_else(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(APT_GET)
    (tools / "apt-get").chmod(0o755)
    first = fetch(tmp_path, f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert first.returncode == 0, first.stderr
    again = fetch(tmp_path, str(tmp_path))  # neither apt nor dpkg now
    assert again.stdout == first.stdout
    folder = Path(first.stdout.strip())
    assert sorted(p.name for p in folder.iterdir()) == ["prometheus", "promtool"]
    assert os.access(folder / "promtool", os.X_OK)
    assert [p.name for p in (tmp_path / "hone").iterdir()] == ["prometheus"], "no litter"
    assert [p.name for p in (tmp_path / "hone" / "prometheus").iterdir()] == ["usr"]
