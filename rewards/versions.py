"""The version of a reward signal: a hash that changes when its code or its settings change.

Invariant: equal code and settings give equal versions in every process; nothing is executed to find
out. Called by `rewards.rubric`, which stamps the version on every verdict.
"""

import ast
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
    """Eight hex digits over the settings of a verifier and the source that it is made of.

    The runtime environment of its pool counts too. Weight, time limit and golden set are no part
    of it: they do not change a score.
    """
    target = resolve_verifier(name, config)
    content: list[object] = [config.use, config.settings]
    if config.pool and config.pool.runtime_env:
        content.append(config.pool.runtime_env)
    digest = hashlib.sha256(json.dumps(content, default=str).encode())
    if (fingerprint := getattr(target, "fingerprint", None)) is not None:
        digest.update(fingerprint(config.settings).encode())  # weights, code of its own plug-ins
    for module_name, source in sorted(sources_of(target.__module__).items()):
        digest.update(f"{module_name}\n{source}".encode())
    return digest.hexdigest()[:8]


def nested_version(name: str, config: object) -> str:
    """The version of a verifier that is a setting of another; "" without one."""
    return reward_version(name, VerifierConfig.model_validate(config)) if config else ""


def sources_of(name: str) -> dict[str, str]:
    """Source by module: `name` and what it uses of its own top-level package, directly or not.

    A module that is named only in a `"module:function"` string, to run in a worker, counts too.
    """
    sources: dict[str, str] = {}
    pending = [name]
    while pending:
        current = pending.pop()
        module = sys.modules.get(current)
        sources[current] = _source_of(current, module)
        used = (
            {_module_of(value) for value in vars(module).values()}
            if module
            else _imports_of(sources[current])
        )
        package = name.partition(".")[0]
        pending += [m for m in used if m.partition(".")[0] == package and m not in sources]
    return sources


def _imports_of(source: str) -> set[str]:
    """What a module that is not loaded here imports or names, by its text."""
    tree = ast.parse(source)
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    names = {_module_of(value.value) for value in values if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            is_package = hasattr(sys.modules.get(node.module), "__path__")
            names |= {f"{node.module}.{a.name}" if is_package else node.module for a in node.names}
    return names


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
