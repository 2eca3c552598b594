"""The `hone` command: every way to start, watch and leave a run from a terminal.

Invariant: nothing heavy is imported before a command needs it, and every failure becomes one plain
message and an exit code: 0 done, 1 the run failed, 2 the user's input, 130 interrupted.
"""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cluster.errors import ConfigError, HoneError, StageError, boundary
from serve import (
    endpoint_cli,
    eval_cli,
    plan_cli,
    replay_cli,
    rewards_cli,
    scale_cli,
    submit_cli,
)

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.run_dir import RunDir

app = typer.Typer(
    name="hone",
    help="Hone trains reasoning language models with reinforcement learning on a Ray cluster.\n\n"
    "Start with `hone doctor`, then `hone check CONFIG`, then `hone train CONFIG`.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted; `hone train` "
    "ends with what is saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
endpoint_cli.register(app)
submit_cli.register(app)
scale_cli.register(app)
app.add_typer(rewards_cli.app, name="rewards")
app.add_typer(replay_cli.app, name="replay")
app.command("eval")(eval_cli.evaluate)
app.command("plan")(plan_cli.plan)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Override config keys, for example `rollout.group_size=4`."
    ),
]
Run = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A name under runs/ or a path; default is the latest."),
]
Address = Annotated[
    str,
    typer.Option(
        help="Ray cluster: `local` starts one, `auto` finds one, or HOST:PORT of its head; "
        "`hone check` takes ray://HOST:PORT too."
    ),
]


def main() -> None:
    """Entry point of the console script."""
    if os.getcwd() not in sys.path:  # of which Python knows nothing when a script starts it
        sys.path.append(os.getcwd())  # plug-ins beside the config; nothing installed is shadowed
    try:
        app()
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except StageError as error:
        print(f"failed in stage {error.stage}: {error.reason}", file=sys.stderr)
        sys.exit(1)
    except HoneError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None, address: Address = "local") -> None:
    """Validate a config, test its rewards on gold answers and print the plan. Starts nothing."""
    from cluster import config_file

    print(f"checking {config}: nothing will be started", flush=True)
    settings = config_file.load(config, overrides)
    if address != "local":
        from actors import preflight

        preflight.require_capacity(settings, address)
    _refuse_problems(settings, address=address, show_plan=True)
    where = [] if address == "local" else ["--address", address]
    print(f"ready: hone train {shlex.join([str(config), *(overrides or []), *where])}")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; overrides `run.name`.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")
    ] = False,
    address: Address = "local",
) -> None:
    """Train. Shows a live view, writes everything to runs/NAME/ and ends with a report."""
    from cluster import config_file, log
    from cluster.run_dir import RunDir

    name = [f"run.name={json.dumps(run)}"] if run else []
    settings = config_file.load(config, [*(overrides or []), *name])
    place = RunDir.at(settings.run.dir, settings.run.name, exist_ok=resume)
    is_new = resume and not place.config.exists()
    note = " (nothing to resume there, starting from the beginning)" if is_new else ""
    print(f"run {place.name}: {config} -> {place.path}{note}", flush=True)
    from cluster.resume import refuse_changes  # takes a second: the line above comes first
    from cluster.run_lock import sole_launcher

    if place.config.exists():
        refuse_changes(settings, place)
    _refuse_problems(settings, address=address, show_plan=False)
    with sole_launcher(place):
        run_dir = RunDir.create(
            settings.run.dir, settings.run.name, config_file.dump(settings), exist_ok=resume
        )
        log.setup("launcher", run_dir)
        code = _run_to_the_end(settings, run_dir, address=address)
    _leave(code)


@app.command()
def status(
    run: Run = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state as JSON.")] = False,
) -> None:
    """Show one screen of a run: step, stages, actors, versions, last events."""
    import msgspec
    from rich.console import Console

    from cluster import status as run_status
    from cluster.run_dir import RunDir
    from serve import status_view

    run_dir = RunDir.open(run)
    state = run_status.read(run_dir.path)
    if state is None:
        raise ConfigError(f"{run_dir.path}: this run has not reported yet (no status.json)")
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(state)).decode())
        return
    pace = status_view.seconds_per_step(run_dir.read_metrics())
    Console(highlight=False).print(status_view.render(state, now=time.time(), step_s=pace))


@app.command()
def report(run: Run = None) -> None:
    """Rewrite report.html of a run from its files; works while it trains."""
    from cluster.run_dir import RunDir
    from serve import report as run_report

    print(run_report.write(RunDir.open(run)))


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A name under runs/ or a path.")],
    dest: Annotated[
        str, typer.Argument(metavar="DEST", help="Directory to create, or a URL such as s3://...")
    ],
    version: Annotated[
        int | None, typer.Option(help="Policy version of a kept checkpoint; default is the newest.")
    ] = None,
) -> None:
    """Write a checkpoint of a run as a Hugging Face model directory."""
    from cluster.run_dir import RunDir
    from serve import export as run_export

    opened = RunDir.open(run)
    if "://" in dest:
        print(run_export.upload(opened, dest, version))
    else:
        print(run_export.write(opened, Path(dest), version))


@app.command()
def doctor() -> None:
    """Check this machine: packages, memory, tools and devices, with a remedy for each finding."""
    from serve import doctor as machine

    raise typer.Exit(machine.show(machine.examine()))


def _refuse_problems(config: "Config", *, address: str, show_plan: bool) -> None:
    """Run all checks, print warnings and the plan; raise `ConfigError` with every problem found."""
    from serve import check as run_check

    result = run_check.build(config, address=address, announce=lambda line: print(line, flush=True))
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if result.problems:
        raise ConfigError("\n".join(result.problems))
    if show_plan:
        width = max(len(name) for name, _ in result.plan)
        for name, value in result.plan:
            print(f"  {name:<{width}}  {value}")


def _run_to_the_end(config: "Config", run_dir: "RunDir", *, address: str) -> int:
    from actors import train as run_loop
    from serve.live_view import LiveView

    try:
        with LiveView(run_dir):
            return run_loop.run(config, run_dir=run_dir, address=address)
    finally:
        _conclude(run_dir)


def _leave(code: int) -> NoReturn:
    """End at once: every process of the run is gone and every file is written, and to unload Ray
    and torch would keep the terminal for seconds more.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _conclude(run_dir: "RunDir") -> None:
    """Write the report and say what came of the run and what is saved of it; a broken report is
    only a warning.
    """
    from cluster.resume import saved_state
    from serve import report as run_report

    try:
        with boundary("report"):
            print(saved_state(run_dir))
            path = run_report.write(run_dir)
            for line in run_report.outcome(run_dir.read_metrics()):
                print(line)
            print(f"report: {path}")
    except HoneError as error:
        print(f"warning: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
