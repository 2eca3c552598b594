"""The policy endpoint as an application that Ray Serve builds itself: what a RayService names.

Invariant: the same replica and the same refusals as `hone serve`; only the door is the cluster's.
Import path `serve.ray_service:build`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.errors import ConfigError
from serve.endpoint_settings import Door, check, resolve

if TYPE_CHECKING:
    from ray.serve import Application


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`args` of the application: a run or a model directory, and the file of hashed keys."""

    run: str
    keys: str
    replicas: int = 1
    engines: int = 2


def build(args: dict[str, str]) -> "Application":
    """The application; `ConfigError` names what is wrong with `args`."""
    try:
        arguments = msgspec.convert(args, Arguments, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"args: {error}") from None
    settings = resolve(arguments.run, keys=Path(arguments.keys), max_engines=arguments.engines)
    check(settings, Door(host="0.0.0.0"))
    from serve.endpoint import application  # imports vllm: only once the arguments are right

    return application(settings, arguments.replicas)
