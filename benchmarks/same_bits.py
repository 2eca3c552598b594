"""Whether two runs ended with the same bits, by every tensor of their newest checkpoints."""

from typing import Any

from cluster.run_dir import RunDir


def final_tensors(run: RunDir) -> dict[str, Any]:
    """Every tensor of the newest checkpoint: weights, optimizer, counters, RNG."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    newest = sorted(run.checkpoints.glob("step_*/COMPLETE"))[-1].parent
    target = run.path / "whole.pt"
    dcp_to_torch_save(newest, target)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, child in value.items():  # pyright: ignore[reportUnknownVariableType]
                walk(f"{prefix}.{key}", child)  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", torch.load(target))
    target.unlink()
    return flat


def differing(first: RunDir, second: RunDir) -> list[str]:
    """Names of the tensors whose bits differ between the ends of two runs."""
    import torch

    a, b = final_tensors(first), final_tensors(second)
    unequal = [n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])]
    return sorted([*(a.keys() ^ b.keys()), *unequal])
