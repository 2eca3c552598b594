"""`hone rewards ...`: look at and change the live rubric of a run that another process trains.

Invariant: every command but `list` needs a living run and ends within its `--deadline`; a refusal
is exit code 1 with the run's reason, and the run goes on as before. The work is done by
`serve.reward_changes`, which the admin API calls, too.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.run_dir import RunDir
    from serve.reward_changes import Change, Edit, Report

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
    import msgspec

    from serve import reward_changes

    known = reward_changes.listing(_open(run))
    if as_json:
        print(json.dumps(msgspec.to_builtins(known), indent=1))
        return
    state = known.state
    marks = {state.previous: "before", known.shadow: "shadow", state.active: "live"}
    for version in state.versions:
        words = reward_changes.words(version.verifiers)
        print(f"{marks.get(version.label, ''):<7} {version.label:<14} {words}")
    if known.report:
        _print_report(known.report)
    if not known.is_alive:
        print("(the run is not training)")


@app.command("try")
def try_(
    run: Run,
    changes: Changes = None,
    groups: Annotated[int, typer.Option(help="Stored groups to score.")] = 16,
    deadline: Deadline = 180.0,
) -> None:
    """Score stored groups with a candidate and show the differences; nothing changes."""
    from serve import reward_changes

    trial = reward_changes.try_out(_open(run), _edits(changes), groups, deadline)
    print(f"candidate {trial.hash}: {reward_changes.words(trial.verifiers)}")
    print(f"gold answers: {trial.gold or 'all paid in full'}")
    _print_report(trial.report)


@app.command()
def shadow(
    run: Run,
    changes: Changes = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the shadow.")] = False,
    deadline: Deadline = 180.0,
) -> None:
    """Let a candidate score live groups beside the live rubric, without influence."""
    from serve import reward_changes

    if stop:
        _print_report(reward_changes.stop_shadow(_open(run), deadline).report or {})
        return
    started = reward_changes.start_shadow(_open(run), _edits(changes), deadline)
    _print_warnings(started.warnings)
    print(f"shadow: {started.version} (`hone rewards list {run}` shows how it compares)")


@app.command()
def promote(run: Run, buffered: Buffered = "keep", deadline: Deadline = 180.0) -> None:
    """Make the shadow the live rubric."""
    from serve import reward_changes

    _print_change(reward_changes.promote(_open(run), buffered, deadline))


@app.command()
def rollback(run: Run, buffered: Buffered = "keep", deadline: Deadline = 180.0) -> None:
    """Make the version before the live one live again."""
    from serve import reward_changes

    _print_change(reward_changes.roll_back(_open(run), buffered, deadline))


@app.command()
def swap(
    run: Run, changes: Changes = None, buffered: Buffered = "keep", deadline: Deadline = 240.0
) -> None:
    """Start a candidate, check it on gold answers, and make it live between two groups."""
    from serve import reward_changes

    _print_change(reward_changes.swap(_open(run), _edits(changes), buffered, deadline))


@app.command("train-process")
def train_process(
    run: Run,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to create.")],
    tasks: Annotated[int, typer.Option(help="Training tasks to sample traces of.")] = 128,
    traces: Annotated[int, typer.Option(help="Traces of each task.")] = 8,
    completions: Annotated[
        int, typer.Option(min=0, help="Continuations of each step; 0: the traces' own outcomes.")
    ] = 4,
    separator: Annotated[str, typer.Option(help="Regular expression that ends a step.")] = r"\n+",
    new_layers: Annotated[
        int, typer.Option(min=0, help="Layers put on top of the policy's, to compare in.")
    ] = 2,
    lm_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight of learning to write the steps, by their value.")
    ] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the traces.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Of sampling and training.")] = 0,
) -> None:
    """Train a process reward model on step values estimated with a run's newest checkpoint."""
    from actors.placement import QUIET_ENV

    os.environ.update(QUIET_ENV)  # read when torch is loaded
    from serve import process_training

    process_training.run(
        _open(run),
        dest,
        process_training.TraceSettings(tasks, traces, completions, separator, seed),
        process_training.ProcessModelSettings(new_layers, lm_weight, epochs, lr=lr, seed=seed),
    )


def _open(run: str) -> "RunDir":
    from cluster.run_dir import RunDir

    return RunDir.open(run)


def _edits(changes: list[str] | None) -> "list[Edit]":
    """Overrides as they are; a YAML file becomes the verifiers that it holds."""
    return [
        _read(Path(change)) if change.endswith((".yaml", ".yml")) and "=" not in change else change
        for change in changes or []
    ]


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


def _print_change(change: "Change") -> None:
    _print_warnings(change.warnings)
    print(f"{change.before} -> {change.to} ({change.choice} {change.buffered} buffered)")


def _print_warnings(warnings: list[str]) -> None:
    for line in warnings:
        print(f"warning: {line}")


def _print_report(found: "Report") -> None:
    report = cast(dict[str, Any], found)
    both = max(1, report["num_trajectories"])
    print(
        f"groups {report['num_groups']} (skipped {report['num_skipped']}, failed "
        f"{report['num_failed']}, {report['num_timeouts']} of them timed out), "
        f"trajectories {report['num_trajectories']}\n"
        f"disagree {report['num_disagree']} ({report['num_disagree'] / both:.1%}), mean reward "
        f"{report['mean_reward']:.3f} (live {report['mean_reward_live']:.3f}), mean difference "
        f"{report['mean_difference']:.3f}\n"
        f"abstained {report['num_abstained']} (live {report['num_abstained_live']}), latency p50 "
        f"{report['latency_p50_s']:.3f} s, p95 {report['latency_p95_s']:.3f} s"
        + (f"\nlast error: {report['last_error']}" if report["last_error"] else "")
    )
