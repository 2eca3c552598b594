"""`hone eval`: held-out pass@1, pass@k and maj@k of a run's checkpoint or a model directory.

Invariant: nothing of the run is touched; what is made on the way is gone at the end.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from actors.evaluate import EvalResult
    from cluster.config import Config
    from cluster.run_dir import RunDir


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL_DIR", help="A run, or a Hugging Face directory.")
    ],
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="YAML file with the tasks and rewards (default: the run's own), and overrides "
            "such as `eval.tasks=200 eval.samples_per_task=8`.",
        ),
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Policy version of a kept checkpoint; default is the newest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    address: Annotated[
        str, typer.Option(help="Ray cluster: `local` starts one, `auto` finds one, or HOST:PORT.")
    ] = "local",
) -> None:
    """Measure pass@1, pass@k and maj@k on held-out tasks, with 95 % intervals.

    pass@1 is the mean over samples; pass@k asks whether any of the k samples of a task is right,
    maj@k whether the most frequent answer is.
    """
    from cluster import config_file, log
    from cluster.run_dir import RunDir
    from serve import check as run_check

    run = None if (Path(target) / "config.json").is_file() else RunDir.open(target)
    settings = _settings(config or [], run)
    if run is None and version is not None:
        raise ConfigError("--version: only a run has versions, and this is a model directory")
    result = run_check.build(settings, address=address, announce=lambda _: None)
    if result.problems:
        raise ConfigError("\n".join(result.problems))
    with tempfile.TemporaryDirectory(prefix="hone-eval-") as folder:
        scratch = RunDir.create(folder, "eval", config_file.dump(settings), exist_ok=False)
        log.setup("launcher", scratch)
        estimates = _run(settings, target, run, version, scratch, address, is_quiet=as_json)
    print(_as_json(estimates) if as_json else _as_text(estimates))


def _settings(arguments: list[str], run: "RunDir | None") -> "Config":
    from cluster import config_file

    is_file = bool(arguments) and "=" not in arguments[0]
    if not is_file and run is None:
        raise ConfigError("CONFIG: required with a model directory (its tasks and rewards)")
    source = Path(arguments[0]) if is_file else run.config if run else Path()
    return config_file.load(source, arguments[1:] if is_file else arguments)


def _run(
    config: "Config",
    target: str,
    run: "RunDir | None",
    version: int | None,
    scratch: "RunDir",
    address: str,
    *,
    is_quiet: bool,
) -> "EvalResult":
    from rich.console import Console
    from rich.progress import Progress

    from actors import standalone_eval
    from rewards.tasksets import load_tasks
    from serve import export

    with Progress(console=Console(stderr=True), transient=True, disable=is_quiet) as progress:
        bar = progress.add_task("loading", total=None)
        directory = Path(target)
        if run is not None:
            directory = export.write(run, scratch.path / "model", version)
        tasks = load_tasks(config.tasks, "eval")[: config.eval.tasks]
        progress.update(bar, total=len(tasks), description=f"{len(tasks)} tasks")
        return standalone_eval.run(
            config, directory, tasks, scratch=scratch, address=address,
            on_task=lambda: progress.advance(bar),
        )  # fmt: skip


def _as_text(result: "EvalResult") -> str:
    k = result.num_samples
    named = [("pass@1", result.pass_at_1), (f"pass@{k}", result.pass_at_k)]
    lines = [
        f"{name:<8} {estimate.value:.3f} ± {estimate.half_width:.3f}"
        for name, estimate in [*named, (f"maj@{k}", result.maj_at_k)]
    ]
    asked = f"{result.num_tasks} tasks, {k} samples each, {result.num_abstained} abstained"
    return "\n".join([*lines, f"95 % intervals over tasks; {asked}"])


def _as_json(result: "EvalResult") -> str:
    named = {"pass@1": result.pass_at_1, "pass@k": result.pass_at_k, "maj@k": result.maj_at_k}
    values: dict[str, object] = {
        name: {
            "value": None if math.isnan(e.value) else e.value,
            "half_width_95": None if math.isnan(e.half_width) else e.half_width,
        }
        for name, e in named.items()
    }
    counts = {
        "k": result.num_samples,
        "num_tasks": result.num_tasks,
        "num_abstained": result.num_abstained,
    }
    return json.dumps(values | counts, indent=1)
