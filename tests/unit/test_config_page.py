"""docs/config.md has every key of the config with its default, and no other."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import Config, Plugin, VerifierConfig

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
ROW = re.compile(r"\| `([\w.]+)` \|\s*(?:`([^|]*)`|(-)|)\s*\|")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Of a field: all members of a union, what a list or dictionary holds not."""
    if get_origin(annotation) in (list, dict):
        return
    for part in get_args(annotation):
        yield from models_in(part)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def keys_of(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        parts = {part for part in models_in(field.annotation) if part is not Plugin}
        if not parts or NoneType in get_args(field.annotation):
            yield f"{prefix}{name}", field
        for part in sorted(parts, key=lambda found: found.__name__):
            yield from keys_of(part, f"{prefix}{name}.")


def expected() -> dict[str, str | None]:
    """Default of each key as YAML, None where it must be given."""
    found = dict(keys_of(Config, ""))
    for key in ("warm_start", "critic"):
        del found[key]
    found |= dict(keys_of(VerifierConfig, "rewards.verifiers.NAME."))
    return {key: shown(field) for key, field in found.items()}


def shown(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel | dict):
        value = plain(value)
    return yaml.safe_dump(value, default_flow_style=True, width=200).split("\n...")[0].strip()


def plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    return {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def test_every_key_stands_there_with_its_default() -> None:
    rows = [match.groups() for match in map(ROW.match, PAGE.read_text().splitlines()) if match]
    page = {key: None if sign == "-" else default or "" for key, default, sign in rows}
    assert len(page) == len(rows), "a key stands there twice"
    wanted = expected()
    assert sorted(page) == sorted(wanted)
    for key, default in wanted.items():
        found = page[key]
        if default is None or found is None:
            assert found == default, key
        else:
            assert (yaml.safe_load(found) or "") == (yaml.safe_load(default) or ""), key
