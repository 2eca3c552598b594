"""The version of a reward signal: a hash that changes when its code or its settings change.

Invariant: equal code and settings give equal versions in every process; nothing is executed to find
out. Called by `rewards.rubric`, which stamps the version on every verdict.
"""

import hashlib
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

from cluster.config import VerifierConfig
from rewards.registry import resolve_verifier

_FUNCTION_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def reward_version(name: str, config: VerifierConfig) -> str:
    """Eight hex digits over the settings and the source of the verifier's module.

    The source includes the modules of the same top-level package that it uses. Weight and time
    limit are no part of it: they do not change a score.
    """
    target = resolve_verifier(name, config)
    digest = hashlib.sha256(json.dumps([config.use, config.settings], default=str).encode())
    sources: dict[str, str] = {}
    _collect_sources(target.__module__, sources)
    for module_name in sorted(sources):
        digest.update(sources[module_name].encode())
    return digest.hexdigest()[:8]


def _collect_sources(name: str, sources: dict[str, str]) -> None:
    module = sys.modules.get(name)
    sources[name] = _source_of(name, module)
    for value in list(vars(module).values()) if module else []:
        used = _module_of(value)
        if used.partition(".")[0] == name.partition(".")[0] and used not in sources:
            _collect_sources(used, sources)


def _source_of(name: str, module: ModuleType | None) -> str:
    try:
        if module is not None:
            return inspect.getsource(module)
        spec = importlib.util.find_spec(name)
        return Path(spec.origin).read_text() if spec and spec.origin else ""
    except (OSError, TypeError, ImportError, ValueError):
        return ""  # built in or typed into a prompt: only its name can count


def _module_of(value: object) -> str:
    """The module that a global is, comes from, or names as `"module:function"`."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, str):
        return value.partition(":")[0] if _FUNCTION_PATH.fullmatch(value) else ""
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else ""
