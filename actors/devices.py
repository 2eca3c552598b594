"""What a config asks of GPUs that a placement cannot give, whatever room there is.

Invariant: a problem is one line that names its knobs. Called by `hone check`, before a run joins a
cluster and when it reserves its places.
"""

from actors.placement import Placement


def problems(placement: Placement) -> list[str]:
    """All of them; none for a placement that works where it fits."""
    config = placement.config
    size, workers = config.rollout.tensor_parallel_size, config.rollout.workers
    ranks = config.learner.world_size
    lines: list[str] = []
    if size > 1 and not placement.is_gpu:
        lines.append(f"rollout.tensor_parallel_size must be 1 without GPUs, got {size}")
    if placement.is_alternating and not placement.is_gpu:
        lines.append(
            "resources.layout alternating needs GPUs, whose memory a sleeping engine gives back: "
            "take split or colocated"
        )
    if config.sync.transport == "shared" and (not placement.is_colocated or workers > ranks):
        lines.append(
            "sync.transport shared needs resources.layout colocated or alternating, and at most as "
            f"many rollout.workers ({workers}) as learner.world_size ({ranks}): an engine takes "
            "the weights from the rank on its own GPU"
        )
    return lines
