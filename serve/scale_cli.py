"""The command `hone scale`: more or fewer rollout workers for a run that another process trains.

Invariant: it ends within its `--deadline`; a refusal is exit code 1 with the run's reason.
"""

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `hone`."""
    app.command("scale")(scale)


def scale(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A name under runs/ or a path.")],
    rollout_workers: Annotated[int, typer.Option(min=1, help="How many rollout workers to have.")],
    deadline: Annotated[float, typer.Option(help="Give up after this many seconds.")] = 600.0,
) -> None:
    """Add or remove rollout workers while a run trains."""
    from cluster.control import ControlClient
    from cluster.run_dir import RunDir

    asked = {"rollout_workers": rollout_workers}
    answer = ControlClient(RunDir.open(run)).ask("fleet.scale", asked, deadline)
    print(f"rollout workers: {answer['before']} -> {answer['after']}")
    print("\n".join(f"  {name}" for name in answer["workers"]))
