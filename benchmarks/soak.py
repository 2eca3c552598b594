"""Hours of a small run that never rests, and whether anything in it grows.

Invariant: every series (memory of each actor, of each key in Redis; processes, open files, files)
is judged by the straight line through its samples after the first quarter: a leak is a slope, noise
is none. Run `python -m benchmarks.soak [--minutes 120] [--folder FOLDER]` on a quiet machine; the
samples are in `FOLDER/soak.jsonl`. Not in CI.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import psutil
import redis
from rich.console import Console

from benchmarks.chaos import LiveRun
from benchmarks.show import Part, Row, judged, measured
from cluster import status
from cluster.embedded_redis import url_in

EVERY_S = 30.0
WARM_STEPS = 50
END_S = 120.0  # from Ctrl-C to the end of the run
ENOUGH = 8  # samples of a series; keys that come and go have fewer
GROWTH = 0.05  # of the mean, that a line may gain
SLACK = {"MiB": 8.0, "KiB": 64.0, "number": 3.0}  # that any line may gain
MIB, KIB = 2**20, 2**10
OPTIONS = [
    "run.steps=100000000", "run.checkpoint_every=100", "rollout.max_policy_age=1",
    "buffer.capacity_groups=128",  # its memory of groups that left is full before the judged part
    "learner.lr=1.0e-6", "tasks.skip_uniform=false",  # what is learnt to the end ends the run
]  # fmt: skip
Sample = dict[str, float]  # series, its unit the last word -> value
REDIS_KEYS = "Redis keys number"


def sample(run: LiveRun) -> Sample:
    """The run as it is now; what ends meanwhile is left out."""
    found: Sample = {}
    state = status.read(run.run.path)
    for actor in state.actors if state else []:
        with suppress(psutil.Error):
            found[f"{actor.name} MiB"] = _tree_bytes(actor.pid) / MIB
    pids = run.processes()
    found["processes number"] = len(pids)
    found["open files number"] = sum(map(_num_files, pids))
    folders = {run.run.path, run.run.weights, *_temporary(pids)}
    found["files number"] = sum(len(files) for folder in folders for *_, files in os.walk(folder))
    with suppress(redis.RedisError):  # it may be writing its file anew
        found |= _in_redis(url_in(run.run.redis))
    return found


def _tree_bytes(pid: int) -> int:
    """Resident memory of an actor and of what it has started, its engine above all."""
    actor = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (actor, *actor.children(recursive=True)))


def _num_files(pid: int) -> int:
    try:
        return psutil.Process(pid).num_fds()
    except psutil.Error:
        return 0


def _temporary(pids: Iterable[int]) -> set[Path]:
    """Where the Ray of these processes keeps its logs and sockets, and they their own files."""
    option, found = "--temp_dir=", set[Path]()
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            words = [w.removeprefix(option) for w in process.cmdline() if w.startswith(option)]
            words.append(process.environ().get("TMPDIR", ""))
            found |= {path for path in map(Path, words) if path.name.startswith("hone-")}
    return found


def _in_redis(url: str) -> Sample:
    client: Any = redis.Redis.from_url(url, socket_timeout=10.0)
    try:
        found = {"Redis MiB": client.info("memory")["used_memory"] / MIB}
        keys: list[bytes] = list(client.scan_iter(count=1000))
        found[REDIS_KEYS] = len(keys)
        for key in keys:
            size: int | None = client.memory_usage(key, samples=0)
            name = key.decode(errors="replace").rpartition("}:")[2].partition(":")[0]
            found[f"Redis {name} KiB"] = found.get(f"Redis {name} KiB", 0) + (size or 0) / KIB
    finally:
        client.close()
    return found


def flat(series: str, points: Sequence[tuple[float, float]]) -> Row:
    """`points` are (seconds, value) of a series after its first quarter."""
    times, values = zip(*points, strict=True)
    gain = linear_regression(times, values).slope * (times[-1] - times[0])
    mean, unit = fmean(values), series.rpartition(" ")[2]
    most = max(GROWTH * abs(mean), SLACK[unit])
    return judged(
        series,
        f"mean {mean:.1f}, {gain:+.2f} in {(times[-1] - times[0]) / 60:.0f} minutes",
        f"at most +{most:.1f}",
        gain <= most,
    )


def verdicts(samples: Sequence[tuple[float, Sample]]) -> Iterator[Row]:
    """A row for each series that was there long enough."""
    by_series: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for when, found in samples[len(samples) // 4 :]:
        for series, value in found.items():
            by_series[series].append((when, value))
    for series, points in sorted(by_series.items()):
        if len(points) >= ENOUGH:
            yield flat(series, points)
    if not any(len(points) >= ENOUGH for points in by_series.values()):
        raise ValueError(f"{len(samples)} samples are too few to judge (--minutes)")


def soak(folder: Path, minutes: float) -> Iterator[Row]:
    run = LiveRun(folder, "soak", OPTIONS)
    samples: list[tuple[float, Sample]] = []
    run.start()
    try:
        run.wait_for_steps(WARM_STEPS)
        started = time.monotonic()
        with (folder / "soak.jsonl").open("a") as file:
            while (now := time.monotonic() - started) < 60 * minutes:
                run.check()
                samples.append((now, sample(run)))
                print(json.dumps({"s": round(now), **samples[-1][1]}), file=file, flush=True)
                time.sleep(EVERY_S)
        steps = run.num_steps
        run.interrupt()
        code = run.finish(END_S)
        left = [*run.leftovers(), *run.pids("redis")]
    finally:
        run.kill_everything()
    yield judged(
        f"{minutes:g} minutes of training, then Ctrl-C",
        f"{steps} steps, exit code {code}, processes left: {len(left)}",
        "exit code 130, none left",
        code == 130 and not left,
    )
    num_answered = sum(REDIS_KEYS in found for _, found in samples)
    yield judged(
        "samples in which Redis answered, so that its keys could be judged",
        f"{num_answered} of {len(samples)}",
        "9 in 10",
        10 * num_answered >= 9 * len(samples) > 0,
    )
    yield from verdicts(samples)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--folder", type=Path, default=None, help="of the run; else one in /tmp")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hone-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{folder}: {options.minutes:g} minutes")
    rows = list(measured(Part("soak", lambda: soak(folder.absolute(), options.minutes))))
    for row in rows:
        console.print(f"{row.claim}: {row.measured} ({row.bound}): {row.verdict} {row.why}")
    return int(any(row.verdict == "falls short" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
