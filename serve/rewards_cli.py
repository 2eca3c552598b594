"""`hone rewards ...`: look at and change the live rubric of a run that another process trains.

Invariant: every command but `list` needs a living run and ends within its `--deadline`; a refusal
is exit code 1 with the run's reason, and the run goes on as before.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.control import ControlClient
    from cluster.run_dir import RunDir

app = typer.Typer(
    help="Change the live rubric of a run: verifiers, their settings and weights.\n\n"
    "A candidate is the live rubric with changes: a YAML file that holds `verifiers:` (or a whole "
    "config), and overrides such as `correct.weight=0.5` or `format=null` to take one out.",
    no_args_is_help=True,
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A name under runs/ or a path.")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE.yaml] [SIGNAL.KEY=VALUE]...", help="The candidate."),
]
Deadline = Annotated[float, typer.Option(help="Give up after this many seconds.")]
Buffered = Annotated[
    str, typer.Option(help="Groups in the buffer with an older version: keep, rescore or drop.")
]


@app.command("list")
def list_versions(
    run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show all rubric versions of a run, which one is live, and the shadow's report."""
    from cluster import reward_state
    from cluster.control import ControlClient

    run_dir = _open(run)
    answer: dict[str, Any]
    try:
        answer = ControlClient(run_dir).ask("rewards.list", {}, 10.0)
    except ConfigError:
        state = reward_state.load(run_dir.path)
        if state is None:
            raise
        answer = {"state": _builtins(state), "shadow": "", "report": None, "is_alive": False}
    if as_json:
        print(json.dumps(answer, indent=1))
        return
    state = answer["state"]
    for version in state["versions"]:
        label = f"{version['ordinal']}-{version['hash']}"
        marks = {state["active"]: "live", state["previous"]: "before", answer["shadow"]: "shadow"}
        print(f"{marks.get(label, ''):<7} {label:<14} {_words(version['verifiers'])}")
    if answer["report"]:
        _print_report(answer["report"])
    if not answer.get("is_alive", True):
        print("(the run is not training)")


@app.command("try")
def try_(
    run: Run,
    changes: Changes = None,
    groups: Annotated[int, typer.Option(help="Stored groups to score.")] = 16,
    deadline: Deadline = 180.0,
) -> None:
    """Score stored groups with a candidate and show the differences; nothing changes."""
    client, candidate = _candidate(run, changes)
    answer = client.ask("rewards.try", {"verifiers": candidate, "groups": groups}, deadline)
    print(f"candidate {answer['hash']}: {_words(answer['verifiers'])}")
    print(f"gold answers: {answer['gold'] or 'all paid in full'}")
    _print_report(answer["report"])


@app.command()
def shadow(
    run: Run,
    changes: Changes = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the shadow.")] = False,
    deadline: Deadline = 180.0,
) -> None:
    """Let a candidate score live groups beside the live rubric, without influence."""
    if stop:
        _print_report(_client(run).ask("rewards.shadow", {"stop": True}, deadline)["report"])
        return
    client, candidate = _candidate(run, changes)
    answer = client.ask("rewards.shadow", {"verifiers": candidate}, deadline)
    _print_warnings(answer)
    print(f"shadow: {answer['version']} (`hone rewards list {run}` shows how it compares)")


@app.command()
def promote(run: Run, buffered: Buffered = "keep", deadline: Deadline = 180.0) -> None:
    """Make the shadow the live rubric."""
    _print_change(_client(run).ask("rewards.promote", {"buffered": buffered}, deadline))


@app.command()
def rollback(run: Run, buffered: Buffered = "keep", deadline: Deadline = 180.0) -> None:
    """Make the version before the live one live again."""
    _print_change(_client(run).ask("rewards.rollback", {"buffered": buffered}, deadline))


@app.command()
def swap(
    run: Run, changes: Changes = None, buffered: Buffered = "keep", deadline: Deadline = 240.0
) -> None:
    """Start a candidate, check it on gold answers, and make it live between two groups."""
    client, candidate = _candidate(run, changes)
    answer = client.ask("rewards.swap", {"verifiers": candidate, "buffered": buffered}, deadline)
    _print_warnings(answer)
    _print_change(answer)


@app.command("train-process")
def train_process(
    run: Run,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to create.")],
    tasks: Annotated[int, typer.Option(help="Training tasks to sample traces of.")] = 128,
    traces: Annotated[int, typer.Option(help="Traces of each task.")] = 8,
    completions: Annotated[int, typer.Option(help="Continuations of each step.")] = 4,
    separator: Annotated[str, typer.Option(help="Regular expression that ends a step.")] = r"\n+",
    epochs: Annotated[int, typer.Option(help="Passes over the traces.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Of sampling and training.")] = 0,
) -> None:
    """Train a process reward model on step values estimated with a run's newest checkpoint."""
    from serve import process_training

    process_training.run(
        _open(run),
        dest,
        process_training.TraceSettings(tasks, traces, completions, separator, seed),
        process_training.ProcessModelSettings(epochs=epochs, lr=lr, seed=seed),
    )


def _open(run: str) -> "RunDir":
    from cluster.run_dir import RunDir

    return RunDir.open(run)


def _client(run: str) -> "ControlClient":
    from cluster.control import ControlClient

    return ControlClient(_open(run))


def _candidate(run: str, changes: list[str] | None) -> tuple["ControlClient", dict[str, Any]]:
    """The live verifiers with the changes applied; without changes, the same settings again (their
    code may have changed).
    """
    client = _client(run)
    state = client.ask("rewards.list", {}, 10.0)["state"]
    live = next(
        v for v in state["versions"] if f"{v['ordinal']}-{v['hash']}" == state["active"]
    )  # fmt: skip
    verifiers: dict[str, Any] = live["verifiers"]
    for change in changes or []:
        if change.endswith((".yaml", ".yml")) and "=" not in change:
            verifiers = _read(Path(change))
        else:
            _override(verifiers, change)
    return client, {name: value for name, value in verifiers.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        loaded: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    for key in ("rewards", "verifiers"):
        if isinstance(loaded, dict):
            loaded = cast(dict[str, Any], loaded).get(key, loaded)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold `verifiers:`, a mapping of signals")
    return cast(dict[str, Any], loaded)


def _override(verifiers: dict[str, Any], change: str) -> None:
    from cluster.config_file import apply_override

    apply_override(verifiers, change)


def _builtins(state: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(state)


def _words(verifiers: dict[str, Any]) -> str:
    def one(name: str, v: dict[str, Any]) -> str:
        chosen: dict[str, Any] = v.get("settings") or {}
        settings = "".join(f" {key}={value}" for key, value in chosen.items())
        return f"{name}: {v['use']} x {v.get('weight', 1.0):g}{settings}"

    return "; ".join(one(name, v) for name, v in verifiers.items())


def _print_change(answer: dict[str, Any]) -> None:
    print(f"{answer['from']} -> {answer['to']} ({answer['choice']} {answer['buffered']} buffered)")


def _print_warnings(answer: dict[str, Any]) -> None:
    for line in answer.get("warnings", []):
        print(f"warning: {line}")


def _print_report(report: dict[str, Any]) -> None:
    both = max(1, report["num_trajectories"])
    print(
        f"groups {report['num_groups']} (skipped {report['num_skipped']}, failed "
        f"{report['num_failed']}), trajectories {report['num_trajectories']}\n"
        f"disagree {report['num_disagree']} ({report['num_disagree'] / both:.1%}), mean reward "
        f"{report['mean_reward']:.3f} (live {report['mean_reward_live']:.3f}), mean difference "
        f"{report['mean_difference']:.3f}\n"
        f"abstained {report['num_abstained']} (live {report['num_abstained_live']}), latency p50 "
        f"{report['latency_p50_s']:.3f} s, p95 {report['latency_p95_s']:.3f} s"
        + (f"\nlast error: {report['last_error']}" if report["last_error"] else "")
    )
