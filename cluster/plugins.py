"""Plug-ins by name: `"package.module:Name"` or a short alias, with keyword settings.

Invariant: a plug-in is found by its string alone, so every Ray process sees the same one;
settings that the class does not accept are refused before anything starts. Used by tasksets,
programs, verifiers, credit and objectives, the extension points of Hone.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import ConfigError

_NUMBERS = ("int", "float", "int | None", "float | None")  # annotations of settings


def resolve(path: str, aliases: Mapping[str, str], knob: str) -> Callable[..., Any]:
    """The class or function that `path` names; `knob` is the config key to blame.

    Example: `resolve("math", {"math": "rewards.math_verifier:MathVerifier"},
    "rewards.verifiers.correct.use")`. Raises `ConfigError` when the module or the name does not
    exist.
    """
    full = aliases.get(path, path)
    module_name, _, attribute = full.partition(":")
    if not attribute:
        near = difflib.get_close_matches(path, aliases, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(aliases))}"
        raise ConfigError(
            f"{knob}: {path!r} is neither a built-in name nor 'package.module:Name' ({hint})"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{knob}: cannot import {module_name!r} of {path!r}: {error}") from error
    target = getattr(module, attribute, None)
    if target is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{knob}: module {module_name!r} has no {attribute!r}{hint}")
    return target


def check_settings(target: Callable[..., Any], settings: Mapping[str, Any], knob: str) -> None:
    """Refuse settings that `target` does not take, naming the nearest one it does, and text where
    it takes a number.
    """
    parameters = inspect.signature(target).parameters
    for name, value in settings.items():
        kinds = str(getattr(parameters.get(name), "annotation", "")).replace("<class ", "")
        if isinstance(value, str) and kinds.strip("'>") in _NUMBERS:
            raise ConfigError(f"{knob}.{name}: must be a number, got {value!r}")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in settings:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"known: {', '.join(parameters) or 'none'}"
            )
            raise ConfigError(f"{knob}.{name}: unknown setting ({hint})")
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and n not in settings
    ]
    if required:
        raise ConfigError(f"{knob}: missing setting(s) {', '.join(required)}")


def build(path: str, settings: Mapping[str, Any], aliases: Mapping[str, str], knob: str) -> Any:
    """Resolve and construct; the plug-in's own `ConfigError` or `ValueError` is reported under
    `knob`.
    """
    target = resolve(path, aliases, knob)
    check_settings(target, settings, f"{knob}.settings" if settings else knob)
    try:
        return target(**settings)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ConfigError(f"{knob}: {error}") from error
