"""Rows of `make show AREA=serve` on a run that trains: `hone train` with `hone serve` beside it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.endpoint_load import free_port
from benchmarks.endpoint_traffic import Traffic, send
from benchmarks.show import Part, Row, judged
from tests import browser
from tests.live_run import LiveRun, live_run

TOKENS = 32


def live_rows(quick: bool, missing: str) -> Iterator[Row | Part]:
    """`missing` says why there is no Chromium."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        live_run(Path(folder), free_port()) as live,
    ):
        yield Part("the README's script", lambda: [_readme(live)])
        yield Part("requests while the run trains", lambda: [_traffic(live, quick)])
        yield Part("a reward swap from the page", lambda: [_swap(live, missing)])
        yield Part("the endpoint when the run ends", lambda: [_end(live)])


def _readme(live: LiveRun) -> Row:
    answer = live.ask_as_the_readme_says()
    is_training = live.train.poll() is None
    return judged(
        "the README's `openai` script asks a run while it trains",
        f"answered by {answer.split()[0]}", "an answer of a version",
        answer.startswith("policy@") and is_training,
    )  # fmt: skip


def _traffic(live: LiveRun, quick: bool) -> Row:
    count, syncs = (400, 6) if quick else (2000, 20)
    first = live.published_version()

    def is_enough() -> bool:
        return live.published_version() >= first + syncs or live.train.poll() is not None

    traffic = send(live.url, live.query, count, tokens=TOKENS, timeout_s=900, is_enough=is_enough)
    return traffic_row(traffic, count, syncs, first, live.published_version())


def traffic_row(traffic: Traffic, count: int, syncs: int, first: int, last: int) -> Row:
    """Whether `count` whole requests ran while the endpoint followed a run from version `first` to
    `last`: what the run published shows nothing, so half of `syncs` must have answered, and some
    answers must have lived through a load.
    """
    num_followed = sum(version > first for version in traffic.versions)
    bound = syncs // 2
    return judged(
        f"{count} requests while the run trains, {syncs} weight syncs under way",
        f"{traffic.num_requests} requests, {last - first} syncs, {num_followed} newer versions "
        f"answered: {traffic}",
        "0 failed, 0 truncated, each one version or an honest span; "
        f"{bound} newer versions answer, some answers across a load",
        traffic.is_whole and traffic.num_requests >= count and last - first >= syncs
        and num_followed >= bound and traffic.num_crossed > 0,
        "; ".join(traffic.failures[:2]),
    )  # fmt: skip


def _swap(live: LiveRun, missing: str) -> Row:
    claim, bound = "a reward swap from the page takes effect in the run", "trained on version 2"
    if browser.chromium() is None:
        return Row(claim, "-", bound, "not shown here", missing)
    live.swap_from_the_page("correct.weight=0.5")
    live.until(lambda: "2-" in live.rubrics(), 120)
    return judged(claim, "a step used groups scored by version 2", bound, True)


def _end(live: LiveRun) -> Row:
    """The endpoint outlives the run, on its last version."""
    code = live.interrupt()
    last = live.checkpoint_version()
    answer = live.ask_as_the_readme_says().split()[0]
    return judged(
        "the endpoint goes on when the run ends", f"exit {code}, {answer} answers",
        f"exit 130, policy@{last}", (code, answer) == (130, f"policy@{last}"),
    )  # fmt: skip
