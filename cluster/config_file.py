"""YAML file plus `section.key=value` overrides to a `Config`, with errors a person can act on.

Invariant: all problems of a file are reported at once, each as one line `key: what is wrong`;
unknown keys name the nearest valid one.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import Config
from cluster.errors import ConfigError

# What a resumed run may change: not what is learnt, only where, how fast and for how long.
BOOKKEEPING: dict[str, Any] = {
    "run": {
        "name",
        "dir",
        "steps",
        "checkpoint_every",
        "keep_checkpoints",
        "samples_per_step",
        "trackers",
    },
    "resources": True,
    "buffer": {"url", "capacity_groups", "lease_s", "max_deliveries"},
    "eval": True,
    "learner": {"world_size", "timeout_s", "save_memory"},
    "rollout": {
        "workers",
        "tensor_parallel_size",
        "kv_cache_gib",
        "gpu_memory_fraction",
        "timeout_s",
    },
    "sync": {"timeout_s", "transport"},
}
_OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")
_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as the number that people mean, as YAML 1.2 does; PyYAML's is 1.1: text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):
    cast(Any, _kind).add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply overrides (`"rollout.group_size=4"`, values are YAML) and validate.

    Raises `ConfigError` with one line per problem.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file")
    try:
        loaded: object = yaml.load(file.read_text(), _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: must be a mapping of sections, got {type(loaded).__name__}")
    values = cast(dict[str, Any], loaded)
    for override in overrides or []:
        apply_override(values, override)
    return parse(values, str(file))


def parse(values: dict[str, Any], source: str) -> Config:
    """Validate plain values; `source` is named in front of each problem."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, as written to `runs/<name>/config.yaml`."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def config_hash(config: Config) -> str:
    """Hash of everything that shapes learning; name, length and bookkeeping of the run are left
    out, and so is what has its default: a key that a later release adds changes no run before it.
    """
    values = config.model_dump(mode="json", exclude=BOOKKEEPING, exclude_defaults=True)
    changed = {section: value for section, value in values.items() if value != {}}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `"section.key=value"` in plain values; raises `ConfigError` where there is no place."""
    if not _OVERRIDE.match(override):
        raise ConfigError(f"override {override!r}: must look like section.key=value")
    key, _, text = override.partition("=")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: value {text!r} is not valid YAML") from error
    *parents, leaf = key.split(".")
    node: Any = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {parent!r} is a value, not a section")
        node = cast(Any, child)
    node[leaf] = value


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"] if part not in ("tiny", "pretrained", "gguf")]
    key = ".".join(location)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1], error["loc"])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        if near:
            return f"{key}: unknown key (did you mean {prefix + '.' if prefix else ''}{near[0]}?)"
        return f"{key}: unknown key (known here: {', '.join(known)})"
    if kind == "missing":
        return f"{key}: required, but not given"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key}: {message}" if key else message
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _fields_at(path: list[str], location: tuple[Any, ...]) -> list[str]:
    """Names of the valid keys of the section at `path`."""
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part) if _is_model(model) else None
        if field is None:
            members = [m for m in get_args(model) if _is_model(m)]
            model = members[-1] if members else model
            continue
        model = _section_of(field.annotation, location)
    if _is_model(model):
        return list(model.model_fields)
    return []


def _section_of(annotation: Any, location: tuple[Any, ...]) -> Any:
    if _is_model(annotation):
        return annotation
    members = [m for m in _flatten(annotation) if _is_model(m)]
    for member in members:
        tag = member.model_fields.get("type")
        if tag is not None and set(get_args(tag.annotation)) & set(location):
            return member
    return members[0] if members else annotation


def _flatten(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [annotation] if not arguments else [leaf for a in arguments for leaf in _flatten(a)]


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
