"""The rules of the house, held by tests: imports, file size, config budget, dead fields."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from cluster.config import Config

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "rewards", "learners", "actors", "serve")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TEXTS = {path: path.read_text() for path in SOURCES}
MAX_LINES = 300
MAX_FIELDS = 93
FORBIDDEN_NAMES = {"utils", "helpers", "misc", "common"}


def config_fields(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted key -> class that declares it, over all sections and union members."""
    fields: dict[str, str] = {}
    for name, field in model.model_fields.items():
        members = [m for m in _members(field.annotation) if issubclass(m, BaseModel)]
        for member in members:
            fields |= config_fields(member, f"{prefix}{name}.")
        if not members:
            fields[prefix + name] = model.__name__
    return fields


def readers(key: str, owner: str) -> list[Path]:
    """Modules that say `section.field`; or `.field` of what they took from a `.section`, or beside
    the name of the section's class.
    """
    *_, section, name = key.split(".")
    by_key = re.compile(rf"\b{section}\.{name}\b")
    taken = re.compile(rf"\b(\w+) (?:=|in) [\w.]*\.{section}\b")
    by_class = re.compile(rf"(?s)\b{owner}\b.*\.{name}\b")

    def is_reader(text: str) -> bool:
        if f".{name}" not in text:  # the searches below are slow
            return False
        names = {match[1] for match in taken.finditer(text)}
        return bool(
            by_key.search(text)
            or by_class.search(text)
            or any(re.search(rf"\b{word}\.{name}\b", text) for word in names)
        )

    return [p for p, text in TEXTS.items() if p.name != "config.py" and is_reader(text)]


def _members(annotation: object) -> list[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [member for argument in get_args(annotation) for member in _members(argument)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_at_most_300_lines_and_a_docstring(path: Path) -> None:
    text = TEXTS[path]
    assert text.count("\n") <= MAX_LINES, "find the second idea in it"
    assert text.startswith('"""'), "a module says what it owns"
    assert path.stem not in FORBIDDEN_NAMES


def test_imports_go_one_way() -> None:
    linter = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert linter.returncode == 0, linter.stdout


@pytest.mark.parametrize(
    "modules",
    [
        [p.stem for p in (ROOT / "cluster").glob("[!_]*.py")],
        [p.stem for p in (ROOT / "rewards").glob("[!_]*.py")],
    ],
    ids=["cluster", "rewards"],
)
def test_contracts_and_checks_import_without_the_heavy_libraries(modules: list[str]) -> None:
    package = "cluster" if "wire" in modules else "rewards"
    program = (
        f"import sys\nfor name in {modules!r}: __import__('{package}.' + name)\n"
        "print([m for m in ('torch', 'vllm', 'ray') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert answer.stdout.strip() == "[]"


def test_no_unit_test_imports_what_takes_seconds() -> None:
    slow = r"transformers|vllm|peft|datasets|reasoning_gym|sympy|math_verify"
    ours = r"learners\.(?:learner|group|policy_dir)|rewards\.gym_taskset|tests\.learner_cases"
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found = re.search(
            rf"^\s*(?:from|import) (?:{slow}|{ours})\b.*", path.read_text(), re.MULTILINE
        )
        assert not found, f"{path.name}: {found} belongs to tests/integration"


def test_only_the_engines_and_their_transfer_plug_in_import_vllm() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path, text in TEXTS.items()
        if re.search(r"^\s*(from|import) vllm\b", text, re.MULTILINE)
    ]
    engines = ["actors/openai_engine.py", "actors/vllm_engine.py"]
    assert users == [*engines, "actors/weight_transfer.py"]


def test_the_packages_are_the_ones_of_this_repository() -> None:
    for package in PACKAGES:
        assert Path(import_module(package).__file__ or "").parent == ROOT / package


def test_the_config_stays_small() -> None:
    assert len(config_fields(Config)) <= MAX_FIELDS


@pytest.mark.parametrize(("key", "owner"), sorted(config_fields(Config).items()))
def test_every_config_field_is_read(key: str, owner: str) -> None:
    is_tag = key.endswith(".type")  # discriminates a union
    assert is_tag or readers(key, owner), f"nobody reads {key}"


def test_a_field_of_the_same_name_elsewhere_is_no_reader() -> None:
    assert readers("run.steps", "RunSection")
    for unread in ("rollout.steps", "buffer.lr", "eval.dir", "sync.url", "guidance.seed"):
        section = unread.partition(".")[0]
        assert readers(unread, f"{section.capitalize()}Section") == []


def test_nothing_unpickles_and_every_ray_get_has_a_deadline() -> None:
    for path, text in TEXTS.items():
        assert not re.search(r"\bpickle\.loads?\(|^import pickle", text, re.MULTILINE), path
        for call in re.findall(r"ray\.get\([^\n]*", text):
            assert "timeout" in call, f"{path}: {call}"
