"""What README.md and docs/ name exists: commands, options, modules, links; and docs/reference.md
lists the metrics, events, files and config sections of the code, neither more nor fewer.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.show import AREAS
from cluster.config import Config
from cluster.run_dir import RunDir
from serve.cli import app

ROOT = Path(__file__).parents[2]
PAGES = {  # as a reader sees them, without comments
    path.name: re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
SECTIONS = dict(
    re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGES["reference.md"], re.DOTALL | re.MULTILINE)
)
SOURCE = "\n".join(
    path.read_text()
    for package in ("actors", "learners", "cluster", "serve")
    for path in sorted((ROOT / package).rglob("*.py"))
)
METRIC = re.compile(
    r'"((?:time|reward|eval|policy|loss|grad|ratio|policy_age|buffer|group|guide|siren|rollout'
    r'|learner|sync|value|warm_start)/[a-z_@0-9/]*[a-z_0-9])"'
)
EVENT = re.compile(r'(?:\bevent|append_event|on_event)\(\s*"([a-z_]+)"')


def listed(section: str) -> list[str]:
    """What stands between backticks in the first column of a section's table."""
    rows = [line for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def commands(page: str) -> Iterator[str]:
    """What a page has the reader type after `hone`, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in "".join(blocks).splitlines():
        yield from re.findall(r"(?<![-\w/.])(?<!-n )hone ([a-z][^#'|;&]*)", line)
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL).replace("\\|", "|")
    yield from re.findall(r"`hone ([a-z][^`]*)`", " ".join(prose.split()))


COMMANDS = sorted({(name, line) for name, page in PAGES.items() for line in commands(page)})


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_exists_with_these_options(page: str, line: str) -> None:
    program: Any = typer.main.get_command(app)
    name, *words = line.replace("[", "").replace("]", "").split()
    found = [program.commands[name]]
    if hasattr(found[0], "commands"):
        names, words = (words[0].split("|"), words[1:]) if words else ([], [])
        found = [found[0].commands[word] for word in names]
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        for command in found:
            assert option in {o for p in command.params for o in (*p.opts, *p.secondary_opts)}


def test_every_command_is_in_the_reference() -> None:
    program: Any = typer.main.get_command(app)
    told = [name.replace("\\|", "|").split() for name in listed("Commands")]
    assert {words[1] for words in told} == program.commands.keys()
    for name, command in program.commands.items():
        if hasattr(command, "commands"):
            known = {sub for words in told if words[1] == name for sub in words[2].split("|")}
            assert known == command.commands.keys()


@pytest.mark.parametrize("page", PAGES)
def test_modules_targets_and_links_exist(page: str) -> None:
    text = PAGES[page]
    for module in re.findall(r"python -m ((?:benchmarks|actors)[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|\n)make ([a-z]+)", text):
        assert f"\n{target}:" in makefile, target
    for areas in re.findall(r"AREA=([a-z|]+)", text):
        assert set(areas.split("|")) <= set(AREAS)
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^):]+)\)", text):
        file, _, anchor = link.partition("#")
        assert not file or (folder / file).exists(), link
        target_page = PAGES.get(Path(file).name if file else page, "")
        headings = re.findall(r"^#+ (.+)$", target_page, re.MULTILINE)
        assert not anchor or anchor in [
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
        ]


def test_every_metric_is_in_the_reference() -> None:
    known = set(listed("Metrics"))
    assert set(METRIC.findall(SOURCE)) - {"learner/0", "rollout/0"} <= known | {
        f"{stage}/busy_fraction" for stage in ("rollout", "score", "learner")
    }


@pytest.mark.parametrize("name", listed("Metrics"))
def test_a_metric_of_the_reference_is_written(name: str) -> None:
    parts = [re.escape(part) for part in re.split(r"<\w+>", name)]
    assert re.search('"' + r"\{[^}]+\}".join(parts) + '"', SOURCE)


def test_every_event_is_in_the_reference() -> None:
    assert set(EVENT.findall(SOURCE)) <= set(listed("Events"))


@pytest.mark.parametrize("kind", listed("Events"))
def test_an_event_of_the_reference_is_written(kind: str) -> None:
    stem, _, last = kind.rpartition("_")
    is_composed = f"{stem}_{{" in SOURCE and f'"{last}"' in SOURCE
    assert f'"{kind}"' in SOURCE or is_composed


def test_config_sections_and_files_of_a_run_are_in_the_reference() -> None:
    sections = SECTIONS["Config sections"].partition(":")[0]
    assert re.findall(r"`(\w+)`", sections) == list(Config.model_fields)
    run = RunDir("run")
    names = {path.name for path in vars(run).values() if isinstance(path, Path)} - {"run"}
    told = {name.partition("/")[0] for name in listed("Run directory `runs/NAME/`")}
    assert names <= told
