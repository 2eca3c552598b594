"""The commands around the policy endpoint: `hone serve`, `hone keys`, `hone chat`.

Invariant: as in `serve.cli`: nothing heavy is imported before a command needs it. A key is printed
once, by the command that makes it, and by nothing else.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from cluster.errors import ConfigError

KEY_ENV = "HONE_API_KEY"
keys_app = typer.Typer(help="API keys of the endpoint.", no_args_is_help=True)
KeysFile = Annotated[Path, typer.Option("--keys", help="File of hashed API keys.")]
_KEYS = Path("runs/keys.json")


def register(app: typer.Typer) -> None:
    """Add the commands to `hone`."""
    app.command("serve")(serve)
    app.command("chat")(chat)
    app.add_typer(keys_app, name="keys")


def serve(
    reference: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|MODEL_DIR]", help="A run, or a Hugging Face directory."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="For example `limits.running=64`."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    tls_key: Annotated[str | None, typer.Option(help="PEM file of the TLS key.")] = None,
    tls_cert: Annotated[str | None, typer.Option(help="PEM file of the TLS certificate.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of hashed API keys.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="No keys; loopback only.")] = False,
    engines: Annotated[
        int, typer.Option(min=1, help="Versions in memory at once: canaries and pins need 2.")
    ] = 2,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the whole endpoint.")] = 1,
    address: Annotated[str, typer.Option(help="Ray cluster: `local`, `auto` or HOST:PORT.")] = (
        "local"
    ),
) -> None:
    """Serve a policy behind an OpenAI-compatible API; follows a run while it trains."""
    if reference is not None and "=" in reference and not Path(reference).exists():
        reference, overrides = None, [reference, *(overrides or [])]
    print(f"serving {reference or 'the latest run'}: loading takes 30 to 60 s", flush=True)
    from serve import endpoint_settings, first_weights

    if not endpoint_settings.is_model_dir(reference):
        from cluster.run_dir import RunDir

        run = RunDir.open(reference)
        first_weights.wait_for(run, lambda line: print(line, flush=True))
    settings = endpoint_settings.resolve(
        reference, overrides=overrides, keys=keys, is_open=no_auth, max_engines=engines
    )
    door = endpoint_settings.Door(host, port, tls_key, tls_cert)
    endpoint_settings.check(settings, door)
    from serve import endpoint

    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with endpoint.running(settings, door, replicas=replicas, address=address) as url:
        print(f"policy endpoint: {url}/v1   page: {url}/   stop: Ctrl-C", flush=True)
        stopping.wait()
        print("stopping", flush=True)


def chat(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Served on this machine; default latest.")
    ] = None,
    model: Annotated[str, typer.Option(help="policy, policy@latest or policy@VERSION.")] = "policy",
    url: Annotated[str | None, typer.Option(help="An endpoint elsewhere.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; default what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
) -> None:
    """Talk to a running endpoint from the terminal; the key comes from HONE_API_KEY, or from
    OPENAI_API_KEY when an endpoint has made it.
    """
    from serve import chat as conversation
    from serve import endpoint_settings

    place = url or endpoint_settings.url_of(run)
    conversation.talk(
        conversation.connect(place, _key()), model, sys.stdin, sys.stdout,
        system=system, max_tokens=max_tokens, temperature=temperature,
    )  # fmt: skip


def _key() -> str:
    """A key of anyone else's never goes to an endpoint."""
    from serve.api_keys import PREFIX

    other = os.environ.get("OPENAI_API_KEY", "")
    return os.environ.get(KEY_ENV) or (other if other.startswith(PREFIX) else "none")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Who or what the key is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="query, view or admin; repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0.001, help="Valid for; default for ever.")] = (
        None
    ),
    requests_per_minute: Annotated[
        int | None, typer.Option(min=0, help="Of this key alone; 0 is no limit.")
    ] = None,
    keys: KeysFile = _KEYS,
) -> None:
    """Make a key and print it once; the file keeps its hash."""
    from serve.api_keys import SCOPES, KeyStore, Scope

    asked = scope or ["query"]
    unknown = [s for s in asked if s not in SCOPES]
    if unknown:
        raise ConfigError(f"--scope: must be one of {', '.join(SCOPES)}, got {unknown[0]!r}")
    scopes: list[Scope] = [s for s in SCOPES if s in asked]
    print(KeyStore(keys).create(name, scopes, days, requests_per_minute))


@keys_app.command("list")
def list_keys(keys: KeysFile = _KEYS) -> None:
    """Names, scopes and dates of the keys."""
    from serve.api_keys import KeyStore

    for key in KeyStore(keys).all():
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created_at))
        ends = "never"
        if key.expires_at is not None:
            ends = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.expires_at))
        print(f"{key.name}  scopes {','.join(key.scopes)}  made {made}  expires {ends}")


@keys_app.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument()], keys: KeysFile = _KEYS) -> None:
    """Remove a key; a running endpoint refuses it from its next request on."""
    from serve.api_keys import KeyStore

    KeyStore(keys).revoke(name)
    print(f"revoked {name}")
