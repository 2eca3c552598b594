import asyncio
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from rewards.isolation import CheckCrashed, CheckTimeout, IsolatedPool

ROOT = Path(__file__).parents[2]


async def test_isolated_calls_carry_plain_data_and_hold_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    pool = IsolatedPool(num_workers=1)
    try:
        assert await pool.run("builtins:sorted", [3, 1, 2], timeout_s=5) == [1, 2, 3]
        environment = await pool.run("subprocess:getoutput", "env", timeout_s=5)
        assert "secret" not in str(environment)
        with pytest.raises(CheckCrashed, match="EOFError"):
            await pool.run("builtins:input", timeout_s=5)
    finally:
        pool.close()


async def test_memory_and_time_of_a_call_are_bounded():
    pool = IsolatedPool(num_workers=1, memory_mib=512)
    try:
        with pytest.raises(CheckCrashed, match="MemoryError"):
            await pool.run("builtins:bytearray", 1 << 30, timeout_s=5)
        with pytest.raises(CheckTimeout, match=r"killed after 0\.3 s"):
            await pool.run("time:sleep", 60, timeout_s=0.3)
        with pytest.raises(CheckCrashed, match="cannot import"):
            await pool.run("no_such_module:f", timeout_s=5)
        with pytest.raises(CheckCrashed, match="plain data"):
            await pool.run("builtins:object", timeout_s=5)
        with pytest.raises(CheckCrashed, match="signal 6"):
            await pool.run("os:abort", timeout_s=5)
        assert await pool.run("builtins:len", "abc", timeout_s=5) == 3
    finally:
        pool.close()


async def test_a_killed_worker_is_replaced_before_the_next_call(tmp_path: Path):
    code = "import os, time\ntime.sleep(0.5)\nsleep = time.sleep\ndef pid(): return os.getpid()\n"
    (tmp_path / "slow_import.py").write_text(code)
    num_children = len(psutil.Process().children())
    pool = IsolatedPool(num_workers=1)
    sys.path.append(str(tmp_path))
    try:
        first = await pool.run("slow_import:pid", timeout_s=5)
        with pytest.raises(CheckTimeout):
            await pool.run("slow_import:sleep", 60, timeout_s=2)
        started = time.monotonic()
        second = await pool.run("slow_import:pid", timeout_s=5)
        assert time.monotonic() - started < 0.4
        assert second != first
        await pool.run("slow_import:sleep", 1, timeout_s=2)  # slow, but sound
        assert len(pool._idle) == 1
    finally:
        sys.path.remove(str(tmp_path))
        await asyncio.to_thread(pool.close)
    assert len(psutil.Process().children()) == num_children


async def test_closing_ends_calls_and_workers():
    pool = IsolatedPool(num_workers=1)
    pid = await pool.run("os:getpid", timeout_s=5)
    hanging = asyncio.create_task(pool.run("time:sleep", 60, timeout_s=60))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(pool.close)
    with pytest.raises(CheckCrashed):
        await hanging
    with pytest.raises(CheckCrashed, match="closed"):
        await pool.run("os:getpid", timeout_s=5)
    assert not psutil.pid_exists(int(str(pid)))


@pytest.mark.parametrize("check", ["time.sleep", "busy"])
def test_workers_die_with_a_killed_parent(check: str, tmp_path: Path):
    (tmp_path / "busy_check.py").write_text("def busy(_):\n    while True:\n        pass\n")
    function = "time:sleep" if check == "time.sleep" else "busy_check:busy"
    script = textwrap.dedent(
        f"""
        import asyncio, sys
        sys.path.append({str(tmp_path)!r})
        from rewards.isolation import IsolatedPool
        async def main():
            pool = IsolatedPool(num_workers=1)
            print(await pool.run("os:getpid", timeout_s=5), flush=True)
            await pool.run({function!r}, 60, timeout_s=60)
        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    parent.kill()
    parent.communicate(timeout=10)
    assert worker.wait(timeout=5) is None or not worker.is_running()


async def test_isolation_works_from_another_thread():
    def in_thread() -> object:
        pool = IsolatedPool(num_workers=1)
        try:
            return asyncio.run(pool.run("os:getpid", timeout_s=5))
        finally:
            pool.close()

    assert await asyncio.to_thread(in_thread) != os.getpid()
