"""What the page must show of a known run: used by the tests of the endpoint and by its rows."""

import json

from cluster.run_dir import RunDir, Sample, TokenColumns
from cluster.types import Verdict
from serve.weight_library import KEEP_PUBLISHED
from tests.browser import Browser
from tests.endpoint_cases import publish

TOKENS = TokenColumns(
    texts=["<b>", "3", "</b>", "\n", "tool"],
    entropies=[0.5, 2.0, 0.0, 1.0, None],
    advantages=[1.5, 1.5, 1.5, 1.5, 0.0],
    policy_versions=[8, 8, 9, 9, 9],
    is_peak=[False, True, False, False, False],
)
_SPANS = "[...document.querySelectorAll('#samples-a pre .t')]"


def known_sample(step: int, reward: float = 1.0) -> Sample:
    """A trajectory whose tokens, figures and verdict are known; its text looks like markup."""
    return Sample(
        step=step, group_id=f"group-{step}", task_id="t", prompt="1 + 2 =", reference="3",
        completion="".join(TOKENS.texts), reward=reward, policy_version=8, status="completed",
        verdicts=[Verdict(score=reward, name="correct", evidence="3 = 3")], tokens=TOKENS,
    )  # fmt: skip


def write_known_run(run: RunDir) -> None:
    """Four steps of curves, and trajectories of two steps."""
    for step, reward in ((8, 0.0), (9, 1.0)):
        run.append_sample(known_sample(step, reward))
    for step in range(1, 5):
        run.append_metrics(step, {"reward/mean": step / 10, "policy/entropy": 1 / step})


def check_keys(page: Browser, url: str, query: str, admin: str) -> None:
    """A key that is none, and `query`, which may not look, are told of and not kept; then `admin`
    opens the page.
    """
    problem = "document.getElementById('problem').textContent"
    page.go(url)
    page.until("!document.getElementById('login').hidden")
    assert page.run(problem) == "", "nobody has given a key yet"
    for key, words in (("hone-wrong", "a valid API key is required"), (query, "scope 'view'")):
        page.write("#key", key)
        page.click("#login button")
        page.until(f"{problem}.includes({json.dumps(words)})")
        assert page.run("sessionStorage.getItem('key')") is None
        assert page.run("document.getElementById('login').hidden") is False
        assert page.run("document.getElementById('main').hidden") is True
    page.write("#key", admin)
    page.click("#login button")
    page.until("!document.getElementById('main').hidden")
    page.until(f"{problem} === ''")


def check_a_choice_stays(page: Browser, run: RunDir, newest: int) -> None:
    """A chosen version that leaves the list stays chosen, marked, until another one is; publishes
    versions above `newest`, which must not be followed.
    """
    options = "[...document.getElementById('version').options]"
    chosen, last = newest + 1, newest + 1 + KEEP_PUBLISHED
    for version in range(chosen, last + 1):
        publish(run, version)
        page.until(f"{options}.some((o) => o.value == '{version}')")
        if version == chosen:
            page.write("#version", str(chosen))
    page.until(f"{options}.some((o) => o.selected && o.textContent == '{chosen} (gone)')")
    assert page.run("document.getElementById('version').value") == str(chosen)
    page.write("#version", str(last))
    page.until(f"!{options}.some((o) => o.value == '{chosen}')")
    assert page.run("document.getElementById('version').value") == str(last)


def check_curves_move(page: Browser, run: RunDir, step: int) -> None:
    line = "document.querySelector('#curves polyline')?.getAttribute('points')"
    before = page.until(line)
    run.append_metrics(step, {"reward/mean": 0.9})
    page.until(f"{line} != {json.dumps(before)}")


def check_tokens(page: Browser) -> None:
    """The newest trajectory, its tokens in each colouring, and two steps side by side."""
    page.until(f"{_SPANS}.length == 5")
    assert page.run(f"{_SPANS}.map((e) => e.textContent)") == TOKENS.texts
    text = page.run("document.querySelector('#samples-a article').innerText")
    for words in ("reward 1", "group group-9", "1 + 2 =", "correct", "1 3 = 3", "<b>3</b>"):
        assert words in text, (words, text)
    shades = {
        by: page.run(
            f"(document.querySelector('[name=colour][value={by}]').click(), "
            f"{_SPANS}.map((e) => e.style.background))"
        )
        for by in ("entropy", "advantage", "version", "peak")
    }
    heat = [_alpha(shade) for shade in shades["entropy"]]
    assert heat[4] == 0 < heat[0] < heat[3] < heat[1] == 0.75
    assert heat[2] == 0
    assert [_alpha(shade) for shade in shades["advantage"]] == [0.45] * 4 + [0]
    assert [shades["version"].index(shade) for shade in shades["version"]] == [0, 0, 2, 2, 2]
    assert page.run(f"{_SPANS}.map((e) => e.classList.contains('peak'))") == TOKENS.is_peak
    page.run(f"{_SPANS}[1].click()")
    told = page.run("document.getElementById('token').textContent")
    assert told == 'token 1 "3": entropy 2, advantage 1.5, version 8, peak'
    page.write("#step-b", "8")
    other = page.until("document.querySelector('#samples-b article')?.innerText")
    assert "reward 0" in other


def check_controls(page: Browser) -> None:
    """Every control has a name, and nothing is wider than a phone."""
    unnamed = page.run(
        "[...document.querySelectorAll('button, select, input, textarea')].filter((e) => "
        "!(e.textContent.trim() && e.tagName == 'BUTTON') && !e.labels?.length).length"
    )
    assert unnamed == 0
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=375, height=800, deviceScaleFactor=1, mobile=True,
    )  # fmt: skip
    assert page.until("document.documentElement.clientWidth == 375")
    assert page.run("document.documentElement.scrollWidth") <= 375


def _alpha(shade: str) -> float:
    """The opacity of `rgba(var(--x), .45)`; 0 without a colour."""
    return float(shade.rstrip(")").rpartition(",")[2]) if shade else 0.0
