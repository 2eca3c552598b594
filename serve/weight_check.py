"""What is asked of a weight file before an engine sees it.

Invariant: a file passes only with the names and shapes of the policy and with finite values. Used
by the engine pool, in a thread.
"""

# pyright: basic

import json
from pathlib import Path

OPTIONAL = ("lm_head.weight", "inv_freq")  # saved by some models, made from others on loading
MAX_HEADER_BYTES = 100 * 2**20


def check_file(path: Path, policy_dir: Path) -> str:
    """Why an engine must not load `path`; empty when it may. Reads every value: use a thread.

    Raises `FileNotFoundError` when `path` is gone, which says nothing about the weights.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    try:
        for file in sorted(policy_dir.glob("*.safetensors")):
            shapes |= _shapes(file)
        found = _shapes(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        return f"not a safetensors file: {error}"
    missing = {n for n in shapes.keys() - found.keys() if not n.endswith(OPTIONAL)}
    differing = sorted(missing | {n for n in found if found[n] != shapes.get(n)})
    if shapes and differing:
        return f"tensors differ from the policy's: {', '.join(differing[:3])}"
    try:
        with safe_open(path, framework="pt") as weights:
            for name in found:
                if not bool(torch.isfinite(weights.get_tensor(name)).all()):
                    return f"{name} holds values that are not finite"
    except SafetensorError as error:
        return f"not a safetensors file: {error}"
    return ""


def _shapes(path: Path) -> dict[str, list[int]]:
    """Tensor names and shapes, from the header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("header too large")
        header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: entry["shape"] for name, entry in header.items()}
