"""float32 matrix products on a CPU by oneDNN, which torch takes for smaller types alone.

torch gives float32 products to MKL, which on CPUs that are not Intel's keeps to older vector
instructions: one thread of an AMD EPYC with AVX-512 does 90 GFLOP/s there and 200 in oneDNN (`make
bench` prints both). Products of a learner are large and many; an engine of vLLM has oneDNN anyway.
Values stay float32, equal up to the order of summation. Products that are added to something
(layers with a bias, the gradient of the output head) stay with torch. Called by the learner.
"""

import functools
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

SMALLEST = 32  # below, in any dimension, MKL is as fast

_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def is_faster(dtype: torch.dtype) -> bool:
    """Whether `install` speeds up products of `dtype` here; MKL is at its best on Intel CPUs."""
    with suppress(OSError):
        return dtype == torch.float32 and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    return False


@functools.cache
def install() -> Library | None:
    """From now on, for this process; None where torch was built without oneDNN."""
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        torch_product = torch.library.get_kernel("aten::mm", "CPU")
    except (AttributeError, RuntimeError):
        return None

    def is_fit(left: Tensor, right: Tensor) -> bool:
        return (
            left.dtype == right.dtype == torch.float32
            and left.dim() == right.dim() == 2
            and left.shape[1] == right.shape[0]
            and min(*left.shape, right.shape[1]) >= SMALLEST
        )

    def mm(left: Tensor, right: Tensor) -> Tensor:
        if not is_fit(left, right):
            return torch_product.call_boxed(_KEYS, left, right)
        weight = right.t()
        if not (right.is_contiguous() or weight.is_contiguous()):
            weight = weight.contiguous()
        return product(left, weight, None, "none", [], "")

    library = Library("aten", "IMPL")
    with warnings.catch_warnings():  # that it overrides
        warnings.simplefilter("ignore")
        library.impl("mm", mm, "CPU")
    return library
