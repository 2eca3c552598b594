"""Whether two runs ended with the same bits: every tensor and number of their newest checkpoints,
the task order in them, and the groups of every step.
"""

import json
from typing import Any

from cluster.ledger import Ledger
from cluster.run_dir import RunDir


def final_values(run: RunDir) -> dict[str, Any]:
    """What the newest checkpoint holds, by its path in it: tensors of weights, optimizer and RNG,
    numbers, text, the task order; and the groups and versions of every step in the ledger.
    """
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
        elif isinstance(value, list | tuple):
            walk(prefix, dict(enumerate(value)))  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[prefix] = value

    walk("", torch.load(target))
    target.unlink()
    state = json.loads((newest / "state.json").read_text())
    walk("state", {key: state[key] for key in ("step", "policy_version", "curriculum")})
    for record in Ledger(run.ledger).records():
        flat[f"step {record.step}"] = (record.group_ids, record.policy_versions, record.skipped)
    return flat


def differing(first: RunDir, second: RunDir) -> list[str]:
    """Names of the values whose bits differ between the ends of two runs. Raises `ValueError` when
    there is no tensor to compare.
    """
    import torch

    def is_same(one: object, other: object) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return one.dtype == other.dtype and torch.equal(
                *(each.contiguous().flatten().view(torch.uint8) for each in (one, other))
            )
        return repr(one) == repr(other)

    a, b = final_values(first), final_values(second)
    if not any(isinstance(value, torch.Tensor) for value in a.values()):
        raise ValueError(f"no tensor in the newest checkpoint of {first.path}")
    unequal = [n for n in a.keys() & b.keys() if not is_same(a[n], b[n])]
    return sorted([*(a.keys() ^ b.keys()), *unequal])
