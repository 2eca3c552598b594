"""From `RUN|MODEL_DIR` and overrides to what a replica needs.

Invariant: everything a user can get wrong is refused here, in one line that names the argument,
before Ray or an engine is started. Called by `hone serve` and by the tests.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml

from actors.placement import EngineSettings, Placement
from cluster import config_file
from cluster.config import Config, TinyPolicy
from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from serve.admission import LOOPBACK, Limits
from serve.api_keys import KeyStore
from serve.guards import GuardSettings

RUNS = Path("runs")
MAX_CONTEXT = 4096  # of a plain model directory; a run knows its own
KV_CACHE_GIB = 1.0


@dataclass(frozen=True)
class EndpointSettings:
    """All a replica needs. `home` is the run directory, or a directory made for a plain model."""

    home: Path
    has_run: bool
    policy_dir: Path
    engine: EngineSettings
    keys: Path
    is_open: bool
    limits: Limits
    guards: GuardSettings
    max_engines: int


@dataclass(frozen=True)
class Door:
    """Where the endpoint listens. TLS needs both files."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_key: str | None = None
    tls_cert: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """What `KEY=VALUE` arguments may set."""

    limits: Limits = Limits()
    guards: GuardSettings = GuardSettings()


def resolve(
    reference: str | None,
    *,
    overrides: list[str] | None = None,
    keys: Path | None = None,
    is_open: bool = False,
    max_engines: int = 2,
    runs: Path = RUNS,
) -> EndpointSettings:
    """Settings for a run (by name or path, None = latest) or a Hugging Face model directory."""
    chosen = _overrides(overrides or [])
    is_model = is_model_dir(reference)
    if is_model:
        policy_dir = Path(str(reference)).resolve()
        home = (runs / f"serve-{policy_dir.name}").resolve()
        home.mkdir(parents=True, exist_ok=True)
        engine = _model_engine(policy_dir)
    else:
        run = RunDir.open(reference, runs)
        home = run.path
        engine = _run_engine(run)
    return EndpointSettings(
        home=home,
        has_run=not is_model,
        policy_dir=engine.policy_dir,
        engine=replace(engine, max_num_seqs=chosen.limits.running),
        keys=(keys or home.parent / "keys.json").absolute(),  # a replica may have another folder
        is_open=is_open,
        limits=chosen.limits,
        guards=chosen.guards,
        max_engines=max_engines,
    )


def url_file(home: Path) -> Path:
    """Holds the URL of the endpoint that serves `home` on this machine, while it does."""
    return home / "endpoint" / "url"


def url_of(reference: str | None, runs: Path = RUNS) -> str:
    """Where the endpoint of a run listens; without a run the latest one's, or the default door."""
    try:
        run = RunDir.open(reference, runs)
    except ConfigError:
        if reference is None:
            return Door().url
        raise
    try:
        return url_file(run.path).read_text().strip()
    except FileNotFoundError:
        if reference is None:
            return Door().url
        raise ConfigError(
            f"{run.path}: no endpoint serves this run on this machine: start `hone serve "
            f"{run.name}`, or name one elsewhere with --url"
        ) from None


def is_model_dir(reference: str | None) -> bool:
    """Whether `RUN|MODEL_DIR` names a Hugging Face directory."""
    return reference is not None and (Path(reference) / "config.json").is_file()


def check(settings: EndpointSettings, door: Door) -> None:
    """Refuse what would open a door to anyone; `ConfigError` names the flag."""
    if bool(door.tls_key) != bool(door.tls_cert):
        raise ConfigError("--tls-key and --tls-cert: give both or none")
    if settings.is_open and door.host not in LOOPBACK:
        raise ConfigError(f"--no-auth: only with a loopback --host, got {door.host}")
    if not settings.is_open and not KeyStore(settings.keys).all():
        raise ConfigError(
            f"no API keys in {settings.keys}: make one with `hone keys create NAME`, "
            "or use --no-auth on loopback"
        )


def _run_engine(run: RunDir) -> EngineSettings:
    from learners.policy_dir import CACHE_DIR, prepare

    config: Config = config_file.load(run.config)
    if isinstance(config.policy, TinyPolicy) and not (run.policy / "config.json").is_file():
        raise ConfigError(f"{run.path}: this run has not made its policy yet; try again shortly")
    policy_dir = prepare(config.policy, [], CACHE_DIR, run.policy, config.run.seed, run.models)
    return Placement.of(config).engine_settings(policy_dir)


def _model_engine(policy_dir: Path) -> EngineSettings:
    described: dict[str, Any] = json.loads((policy_dir / "config.json").read_text())
    dtype = str(described.get("dtype") or described.get("torch_dtype") or "float32")
    length = int(described.get("max_position_embeddings", MAX_CONTEXT))
    is_gpu = _has_gpu()
    return EngineSettings(
        policy_dir=policy_dir,
        dtype=dtype,
        context_length=min(length, MAX_CONTEXT),
        tensor_parallel_size=1,
        is_gpu=is_gpu,
        kv_cache_gib=KV_CACHE_GIB,
        gpu_memory_fraction=0.85,
        max_num_seqs=256,
    )


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def _overrides(texts: list[str]) -> Overrides:
    values: dict[str, dict[str, object]] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        section, _, name = key.partition(".")
        known = {"limits": Limits, "guards": GuardSettings}.get(section)
        if not separator or known is None or name not in known.__struct_fields__:
            names = [f"limits.{n}" for n in Limits.__struct_fields__]
            names += [f"guards.{n}" for n in GuardSettings.__struct_fields__]
            raise ConfigError(f"{text}: must be KEY=VALUE with one of {', '.join(names)}")
        values.setdefault(section, {})[name] = cast(object, yaml.safe_load(value))
    try:
        return msgspec.convert(values, Overrides, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{' '.join(texts)}: {error}") from None
