"""How to split GPUs between rollout and learner: a forecast for each split, and the best of them.

Invariant: forecasts are simulations (`cluster.simulation`) of measured stage times, and say so. A
GPU is worth what a device of the profiled run was worth. Called by `hone plan` and the benchmarks.
"""

from collections.abc import Iterator, Sequence

from rich.table import Table

from cluster.config import BufferSection
from cluster.errors import ConfigError
from cluster.simulation import Forecast, Layout, simulate
from cluster.stage_profile import StageProfile

SIXTEENTHS = (1, 2, 4, 6, 8, 10, 12, 14, 15)  # of the GPUs, for the learner
MANY_GROUPS = 2000
AS_FAST = 0.97  # of the fastest: then less age is worth more


def layouts(
    profile: StageProfile, num_gpus: int, ages: Sequence[int], groups_per_step: int
) -> list[Layout]:
    """Splits of `num_gpus`, the learner's part growing, for each bound on policy age."""
    world_sizes = sorted({max(1, round(num_gpus * part / 16)) for part in SIXTEENTHS})
    splits = [((num_gpus - n) // profile.gpus_per_worker, n) for n in world_sizes]
    found = [
        Layout(
            workers=workers,
            world_size=world_size,
            max_policy_age=age,
            groups_per_step=groups_per_step,
        )
        for age in ages
        for workers, world_size in splits
        if workers > 0
    ]
    if not found:
        raise ConfigError(
            f"--gpus {num_gpus}: must hold a learner rank and an engine of "
            f"{profile.gpus_per_worker} GPU(s) (rollout.tensor_parallel_size)"
        )
    return found


def forecasts(profile: StageProfile, choices: Sequence[Layout]) -> Iterator[Forecast]:
    """One after the other; fewer steps where a step has groups enough for a mean."""
    for layout in choices:
        steps = 20 if layout.groups_per_step < MANY_GROUPS else 5
        yield simulate(profile, layout, steps=steps)


def best(found: Sequence[Forecast]) -> Forecast:
    """The fastest; of those nearly as fast the one with the youngest groups."""
    fastest = max(forecast.groups_per_s for forecast in found)
    near = [forecast for forecast in found if forecast.groups_per_s >= AS_FAST * fastest]
    return min(near, key=lambda f: (f.layout.max_policy_age, -f.groups_per_s))


def overrides(layout: Layout) -> list[str]:
    """What to give `hone train` for this layout."""
    given = [
        f"rollout.workers={layout.workers}",
        f"learner.world_size={layout.world_size}",
        f"rollout.max_policy_age={layout.max_policy_age}",
        f"rollout.groups_per_step={layout.groups_per_step}",
    ]
    needed = layout.num_slots + layout.groups_per_step
    if needed > BufferSection().capacity_groups:
        given.append(f"buffer.capacity_groups={needed}")
    return given


def table(found: Sequence[Forecast], chosen: Forecast | None = None) -> Table:
    """A row per forecast, the chosen one marked."""
    rows = Table(
        "rollout workers", "learner ranks", "max policy age", "groups a step", "step s",
        "groups/s", "age mean", "age max", "rollout idle", "learner idle", "",
        title="simulated",
    )  # fmt: skip
    for forecast in found:
        layout = forecast.layout
        rows.add_row(
            f"{layout.workers:,}",
            f"{layout.world_size:,}",
            str(layout.max_policy_age),
            f"{layout.groups_per_step:,}",
            f"{forecast.step_s:.3g}",
            f"{forecast.groups_per_s:.3g}",
            f"{forecast.age_mean:.2f}",
            str(forecast.age_max),
            f"{forecast.rollout_idle:.0%}",
            f"{forecast.learner_idle:.0%}",
            "best" if forecast is chosen else "",
        )
    return rows
