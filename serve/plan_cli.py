"""The command `hone plan`. Nothing heavy is imported before it runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.stage_profile import StageProfile


def plan(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A finished run to measure; default is the latest."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Stage times from a file that --write made, not a run.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=2, help="GPUs to split.")] = 8,
    age: Annotated[
        list[int] | None,
        typer.Option(min=0, help="rollout.max_policy_age to try; may be repeated."),
    ] = None,
    groups_per_step: Annotated[
        int | None, typer.Option(min=1, help="Default is that of the run.")
    ] = None,
    model_scale: Annotated[
        float, typer.Option(help="All work on tokens and weights takes this many times as long.")
    ] = 1.0,
    learner_efficiency: Annotated[
        float | None, typer.Option(help="Speed kept at each doubling of learner ranks, up to 1.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="MEAN,SIGMA,CAP: log-normal completion lengths; default is the run's."),
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the stage times here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Split GPUs between rollout and learner by simulation of a run's stage times."""
    import msgspec
    from rich.console import Console

    from cluster.run_dir import RunDir
    from cluster.stage_profile import StageProfile
    from serve import scaling

    if profile is not None and run is not None:
        raise ConfigError(f"give a run or --profile, got {run} and {profile}")
    measured = StageProfile.read(profile) if profile else StageProfile.of_run(RunDir.open(run))
    if write is not None:
        measured.write(write)
    asked = _asked(measured, model_scale, learner_efficiency, lengths)
    num_groups = groups_per_step or measured.groups_per_step
    ages = list(dict.fromkeys(age or [measured.max_policy_age]))
    choices = scaling.layouts(asked, gpus, ages, num_groups)
    print(f"{len(choices)} simulations of {gpus} GPUs, {num_groups} groups a step", file=sys.stderr)
    found = list(scaling.forecasts(asked, choices))
    chosen = scaling.best(found)
    if as_json:
        answer = {"source": asked.source, "forecasts": found, "best": chosen}
        print(json.dumps(msgspec.to_builtins(answer), indent=1))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(scaling.table(found, chosen))
    print(f"stage times: {asked.source}; a GPU is what a device of that run was")
    print(f"recommended: {' '.join(scaling.overrides(chosen.layout))}")


def _asked(
    measured: "StageProfile", scale: float, efficiency: float | None, lengths: str | None
) -> "StageProfile":
    """The measured profile with what the options change."""
    import msgspec

    if scale <= 0:
        raise ConfigError(f"--model-scale must be above 0, got {scale:g}")
    asked = measured if scale == 1 else measured.with_model(scale)
    if lengths is not None:
        try:
            mean, sigma, cap = lengths.split(",")
            asked = asked.with_lengths(float(mean), float(sigma), int(cap))
        except ValueError as error:
            raise ConfigError(
                f"--lengths must be MEAN,SIGMA,CAP such as 512,1.0,4096, got {lengths}: {error}"
            ) from error
    if efficiency is None:
        return asked
    try:
        return msgspec.structs.replace(asked, learner_efficiency=efficiency)
    except ValueError as error:
        raise ConfigError(f"--learner-efficiency: {error}") from error
