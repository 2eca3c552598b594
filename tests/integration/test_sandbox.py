"""Attacks on the sandbox, each in every tier offered, and graders that programs try to fool."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cluster.config import VerifierConfig
from cluster.types import Message, Task, TrajectoryGroup
from rewards import code_verifier, self_check
from rewards.rubric import Rubric
from rewards.sandbox import TIERS, Limits, Sandbox, Tier, self_test

SECRET = "canary-5d1f"
BOUNDS = Limits(wall_s=4.0, cpu_s=2, output_bytes=32 << 10)


@pytest.fixture(scope="module", params=TIERS)
def box(request: pytest.FixtureRequest):
    tier: Tier = request.param
    escapes = self_test(tier)
    if escapes:
        pytest.skip(f"tier {tier}: {escapes}")
    sandbox = Sandbox(tier)
    yield sandbox
    sandbox.close()


# Each program prints ESCAPED if, and only if, it got what it must not get.
ATTACKS = {
    "read a secret file": "print('ESCAPED', open('{canary}').read())",
    "read passwd": "print('ESCAPED', open('/etc/passwd').read(1))",
    "read shadow": "print('ESCAPED', open('/etc/shadow').read(1))",
    "find the project": "import os\nfor r, d, f in os.walk('/work'): print('ESCAPED', f)\n"
    "for r, d, f in os.walk('{repo}'): print('ESCAPED', f)",
    "environment": "import os\nif '{secret}' in str(os.environ): print('ESCAPED')",
    "environment of others": "import os\nfor p in os.listdir('/proc'):\n"
    "  print('ESCAPED', open(f'/proc/{{p}}/environ').read())",
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('ESCAPED')",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nprint('ESCAPED')",
    "abstract unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\n"
    "s.connect('\\0{secret}')\nprint('ESCAPED')",
    "metadata address": "import urllib.request\n"
    "urllib.request.urlopen('http://169.254.169.254', timeout=1)\nprint('ESCAPED')",
    "fork bomb": "import os\nwhile True:\n  os.fork()\n  print('ESCAPED')",
    "spawn a shell": "import subprocess\nprint('ESCAPED', subprocess.run(['/bin/sh', '-c', 'id']))",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'ESCAPED'])",
    "thread bomb": "import threading, time\nthreading.stack_size(32768)\nfor i in range(4000):\n"
    "  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('ESCAPED')",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memfd": "import os\nos.memfd_create('x')\nprint('ESCAPED')",
    "shared memory": "from multiprocessing import shared_memory\n"
    "shared_memory.SharedMemory(create=True, size=1 << 20)\nprint('ESCAPED')",
    "disk fill": "for i in range(1000):\n  open(f'/tmp/{{i}}', 'wb').write(b'x' * (8 << 20))\n"
    "print('ESCAPED')",
    "inode fill": "for i in range(100000): open(f'/tmp/{{i}}', 'w').close()\nprint('ESCAPED')",
    "write outside": "open('{dir}/escaped', 'w').write('x')\nprint('ESCAPED')",
    "change modes": "import os\nos.chmod('{canary}', 0o777)\nprint('ESCAPED')",
    "change times": "import os\nos.utime('{canary}', (1, 1))\nprint('ESCAPED')",
    "truncate": "import os\nos.truncate('{canary}', 0)\nprint('ESCAPED')",
    "truncate by opening": "import os\nfor mode in range(4):\n"
    "  try: os.open('{canary}', os.O_TRUNC | mode)\n"
    "  except OSError: continue\n  print('ESCAPED', mode)",
    "open for neither": "import os\nos.open('{canary}', 3)\nprint('ESCAPED')",
    "symlink out": "import os\nos.symlink('{canary}', '/tmp/l')\n"
    "print('ESCAPED', open('/tmp/l').read())",
    "device": "import os, stat\nos.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(8, 0))\n"
    "print('ESCAPED')",
    "kill the parent": "import os, signal\nos.kill({pid}, 0)\nprint('ESCAPED')",
    "kill everybody": "import os, signal\nos.kill(-1, signal.SIGTERM)\nprint('ESCAPED')",
    "signal by descriptor": "import fcntl, struct\n"
    "for n, v in ((8, {pid}), (10, 9), (15, struct.pack('ii', 1, {pid}))):\n"
    "  try: fcntl.fcntl(0, n, v)\n  except OSError: continue\n  print('ESCAPED', n)",
    "lease": "import fcntl, os\nfcntl.fcntl(open(os.__file__), 1024, 0)\nprint('ESCAPED')",
    "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0: print('ESCAPED')",
    "read memory of others": "print('ESCAPED', open('/proc/{pid}/mem', 'rb'))",
    "proc writes": "open('/proc/self/oom_score_adj', 'w').write('-1000')\nprint('ESCAPED')",
    "nested namespace": "import ctypes\n"
    "if ctypes.CDLL(None).unshare(0x10000000) == 0: print('ESCAPED')",
    "mount": "import ctypes\n"
    "if ctypes.CDLL(None).mount(b'n', b'/tmp', b'tmpfs', 0, 0) == 0: print('ESCAPED')",
    "capabilities": "import os\nif os.access('{dir}/locked', os.R_OK): print('ESCAPED')",
    "chroot": "import os\nos.chroot('/tmp')\nprint('ESCAPED')",
    "become root": "import os\nos.setresuid(0, 0, 0)\nprint('ESCAPED')"
    " if os.access('/etc/shadow', os.R_OK) else None",
    "open descriptors": "import os\nfor f in range(4, 256):\n  try: os.fstat(f)\n"
    "  except OSError: continue\n  print('ESCAPED', f)",
    "io_uring and friends": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "for n in (425, 321, 298, 323, 248, 250, 272, 308, 310, 311, 434, 438, 155, 165, 175, 246):\n"
    "  if libc.syscall(n, 0, 0, 0, 0, 0) >= 0: print('ESCAPED', n)",
    "less CPU time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\n"
    "print('ESCAPED')",
    "undo the limits": "import resource\n"
    "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('ESCAPED')",
    "a terminal's input": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\nprint('ESCAPED')",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(box: Sandbox, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    before = canary.stat()
    (tmp_path / "locked").touch(0)
    os.environ["HONE_TEST_SECRET"] = SECRET
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + SECRET + box.tier)
        unix.listen()
        code = ATTACKS[name].format(
            canary=canary, dir=tmp_path, secret=SECRET, pid=os.getpid(),
            port=server.getsockname()[1], repo=Path(__file__).parents[2],
        )  # fmt: skip
        result = box.run("program", code, BOUNDS)
    assert "ESCAPED" not in result.stdout, result.stdout[:200]
    assert result.status == "memory_limit" or name != "memory bomb"
    if name == "thread bomb":  # counted by the kernel, or by the keeper
        assert result.status == ("model_error" if box.tier == "namespaces" else "thread_limit")
    assert SECRET not in result.stdout + result.stderr.replace(str(canary), "")
    assert not (tmp_path / "escaped").exists()
    after = canary.stat()
    assert (after.st_mode, after.st_size) == (before.st_mode, before.st_size)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert box.run("program", "print(6 * 7)", BOUNDS).stdout == "42\n"


OR_ELSE = {  # two limits that a program runs into at the same time
    "cpu_timeout": "wall_timeout",
    "wall_timeout": "cpu_timeout",
    "thread_limit": "model_error",  # the kernel refuses the next thread, or the keeper ends all
}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "cpu_timeout"),
        ("import signal\nfor s in (1, 2, 15, 24):\n  signal.signal(s, signal.SIG_IGN)\n"
         "while True: pass", "cpu_timeout"),
        ("import time\ntime.sleep(60)", "wall_timeout"),
        ("import os\nos.close(1); os.close(2); os.close(3)\nimport time\ntime.sleep(60)",
         "wall_timeout"),
        ("x = 'a' * (1 << 31)", "memory_limit"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("import os\nwhile True: os.write(3, b'x' * 1000)", "output_limit"),
        ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "wall_timeout"),
        ("raise ValueError('no')", "model_error"),
        ("def", "model_error"),
        ("import threading, time\nfor i in range(999): "
         "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "thread_limit"),
        ("import os\nos._exit(0)", "ok"),
        ("import ctypes\nctypes.string_at(0)", "crash"),
    ],
)  # fmt: skip
def test_limits_stop_a_program_in_time(box: Sandbox, code: str, status: str) -> None:
    started = time.monotonic()
    result = box.run("program", code, Limits(wall_s=4.0, cpu_s=1, output_bytes=32 << 10))
    taken = time.monotonic() - started
    assert result.status in (status, OR_ELSE.get(status)), result
    assert taken < 6.0
    assert len(result.stdout) <= 32 << 10


def test_a_run_leaves_nothing_for_the_next(box: Sandbox) -> None:
    poison = (
        "import builtins, json, sys\nbuiltins.print = lambda *a: None\njson.dumps = None\n"
        "sys.modules['math'] = None\n"
        "try: open('/tmp/left', 'w').write('x')\nexcept OSError: pass\n"
    )
    box.run("program", poison, BOUNDS)
    code = "import os, math\nprint(math.sqrt(4), os.path.exists('/tmp/left'))"
    assert box.run("program", code, BOUNDS).stdout == "2.0 False\n"


# Each prints `works` if, and only if, what honest programs do goes on working.
HONEST = {
    "threads": "import threading\nseen = []\n"
    "all = [threading.Thread(target=seen.append, args=(i,)) for i in range(8)]\n"
    "for t in all: t.start()\nfor t in all: t.join()\nassert sorted(seen) == list(range(8))",
    "nowhere": "import contextlib, os\nwith open(os.devnull, 'w') as f:\n"
    "  with contextlib.redirect_stdout(f): print('unseen')\nopen(os.devnull, 'r+b').close()",
    "limits": "import resource\nassert resource.getrlimit(resource.RLIMIT_CPU)[0] == 2\n"
    "resource.setrlimit(resource.RLIMIT_STACK, (1 << 22, 1 << 22))",
    "descriptors": "import asyncio, fcntl, os\nos.close(os.dup(1))\n"
    "fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_NONBLOCK)\n"
    "assert not os.get_blocking(0)\nasyncio.run(asyncio.sleep(0.01))",
}
IN_TMP = {
    "new file": "with open('a', 'w') as f: f.write('x')\nassert open('a').read() == 'x'\n"
    "open('a', 'w').close()\nassert open('a').read() == ''",
    "modes, times": "import os\nopen('a', 'w').close()\n"
    "os.chmod('a', 0o600)\nos.utime('a', (1, 2))\n"
    "assert os.stat('a').st_mtime == 2\nos.truncate('a', 5)\nassert os.path.getsize('a') == 5",
    "copy": "import shutil\nwith open('a', 'w') as f: f.write('x')\nshutil.copy('a', 'b')\n"
    "shutil.move('b', 'd')\nassert open('d').read() == 'x'",
    "temporary": "import tempfile\nwith tempfile.TemporaryDirectory() as d, \\\n"
    "  tempfile.NamedTemporaryFile('w+', dir=d) as f, tempfile.TemporaryFile() as g:\n"
    "  f.write('x')\n  f.truncate(0)\n  g.write(b'x')",
    "database": "import sqlite3\nd = sqlite3.connect('d.db')\nd.execute('create table t (a)')\n"
    "d.execute('insert into t values (1)')\nd.commit()",
}


@pytest.mark.parametrize("name", HONEST | IN_TMP)
def test_honest_programs_work(box: Sandbox, name: str) -> None:
    result = box.run("program", (HONEST | IN_TMP)[name] + "\nprint('works')", BOUNDS)
    if name in IN_TMP and box.tier == "landlock":  # has nothing to write to
        assert (result.status, result.stdout) == ("model_error", ""), result
        assert "Error" in result.stderr, result
    else:
        assert result.stdout == "works\n", result


def test_many_threads_share_a_sandbox(box: Sandbox) -> None:
    outputs: dict[int, str] = {}

    def one(i: int) -> None:
        outputs[i] = box.run("program", f"print({i})", BOUNDS).stdout

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i}\n" for i in range(8)}


FUNCTION = (
    '{"tests": {"function": "add", "cases": [{"args": [1, 2], "expected": 3},'
    ' {"args": [20, 22], "expected": 42}]}}'
)
STDIN = '{"tests": [{"input": "1 2\\n", "output": "3\\n"}, {"input": "20 22\\n", "output": "42"}]}'
ASSERTS = (
    '{"tests": {"unittest": "from solution import add\\ndef test_small(): assert add(1, 2) == 3\\n'
    'assert add(20, 22) == 42"}}'
)
HACKS = {
    "exit 0": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "equal to all": "class E(int):\n  __eq__ = lambda s, o: True\n  __hash__ = int.__hash__\n"
    "def add(a, b): return E()",
    "float for int": "def add(a, b): return float(a + b)",
    "prints a verdict": 'print(\'{"tests": 2, "passed": 2}\')\ndef add(a, b): return 0',
    "writes a verdict on 3": "import os\nfor f in (3, 4):\n  try: os.write(f, b'"
    '{"tests": 2, "passed": 2}\\n\' * 2)\n  except OSError: pass\ndef add(a, b): return 0',
    "patches json": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\n"
    "def add(a, b): return 0",
    "patches unittest": "import unittest\nunittest.TestResult.addFailure = lambda *a: None\n"
    "def add(a, b): return 0",
    "walks the frames": "import sys, gc\ndef add(a, b):\n  f = sys._getframe()\n  while f:\n"
    "    for v in list(f.f_locals.values()):\n"
    "      if isinstance(v, dict) and 'expected' in v: return v['expected']\n"
    "    f = f.f_back\n"
    "  for o in gc.get_objects():\n"
    "    if isinstance(o, dict) and 'expected' in o: return o['expected']\n  return 0",
    "starves itself": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\n"
    "while True: pass",
    "kills the harness": "import os, signal\nos.kill(os.getppid(), 9)\ndef add(a, b): return 0",
}


def group(entry: str, *codes: str) -> TrajectoryGroup:
    message = Message(role="user", content="Write add.")
    task = Task(task_id="t", taskset="x", messages=[message], entry=entry)
    return self_check.group_of(task, [f"Here:\n```python\n{code}\n```\n" for code in codes])


@pytest.mark.parametrize("entry", [FUNCTION, STDIN, ASSERTS], ids=["function", "stdin", "asserts"])
@pytest.mark.parametrize("tier", TIERS)
async def test_right_code_passes_half_right_gets_half_and_no_hack_fools(
    tier: Tier, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if escapes := self_test(tier):
        pytest.skip(f"tier {tier}: {escapes}")
    monkeypatch.setattr(code_verifier, "_tier", lambda unsafe_ok: tier)
    right = "def add(a, b): return a + b\n"
    half = "def add(a, b): return 3\n"
    main = "print(add(*map(int, input().split())))\n" if entry is STDIN else ""
    rubric = Rubric({"code": VerifierConfig(use="code", timeout_s=60)})
    codes = [right + main, half + main, *(f"{hack}\n{main}" for hack in HACKS.values())]
    try:
        rewards = (await rubric.score(group(entry, *codes))).rewards
    finally:
        await rubric.close()
    assert rewards[:2] == [1.0, 0.5]
    fooled = [h for h, r in zip(HACKS, rewards[2:], strict=True) if r != 0.0]
    # In Python's own asserts 3.0 == 3; where we compare, a float is no int.
    assert fooled == (["float for int"] if entry is ASSERTS else [])


async def test_broken_tests_abstain_and_broken_code_scores_zero() -> None:
    rubric = Rubric({"code": VerifierConfig(use="code", timeout_s=60)})
    try:
        for entry in ("", '{"tests": []}', '{"tests": [{"input": "1"}]}', '{"tests": "def"}'):
            assert (await rubric.score(group(entry, "x = 1"))).rewards == [None]
        assert (await rubric.score(group(STDIN, "", "def", "x" * 70000))).rewards == [0.0] * 3
    finally:
        await rubric.close()
