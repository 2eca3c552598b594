"""The command `hone submit`. Nothing heavy is imported before it runs."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `hone`."""
    app.command("submit")(submit)


def submit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override config keys, as for `hone train`."),
    ] = None,
    address: Annotated[
        str, typer.Option(help="Dashboard of the cluster's head, like http://HEAD:8265.")
    ] = "http://127.0.0.1:8265",
    run: Annotated[str | None, typer.Option(help="Name of the run; overrides `run.name`.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job until it ends.")
    ] = True,
) -> None:
    """Train as a job of a running Ray cluster. Ctrl-C stops following, not the job."""
    from serve import submit as jobs

    job = jobs.submit(config, overrides or [], address=address, run=run, resume=resume)
    print(f"job {job.submission_id}; end it with: {job.stop_command}", flush=True)
    if not wait:
        return
    try:
        raise typer.Exit(jobs.follow(job))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; end it with: {job.stop_command}")
        raise typer.Exit(0) from None
