"""float32 matrix products on a CPU by oneDNN, which torch takes for smaller types alone.

torch gives float32 products to MKL, which on CPUs that are not Intel's keeps to older vector
instructions: one thread of an AMD EPYC with AVX-512 does 90 GFLOP/s there and 200 in oneDNN (`make
bench` prints both). Products of a learner are large and many; an engine of vLLM has oneDNN anyway.
Values stay float32, equal up to the order of summation. Called by the learner.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.library import Library

SMALLEST = 32  # below, in any dimension, MKL is as fast

_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@functools.cache
def install() -> Library | None:
    """From now on, for this process; None where torch was built without oneDNN for x86."""
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        torch_product = torch.library.get_kernel("aten::mm", "CPU")
    except (AttributeError, RuntimeError):
        return None

    def mm(left: Tensor, right: Tensor) -> Tensor:
        is_large = min(*left.shape, right.shape[1]) >= SMALLEST
        is_valid = left.shape[1] == right.shape[0] and left.dtype == right.dtype
        if is_large and is_valid and left.dtype == torch.float32:
            return product(left, right.t(), None, "none", [], "")
        return torch_product.call_boxed(_KEYS, left, right)

    library = Library("aten", "IMPL")
    with warnings.catch_warnings():  # that it overrides
        warnings.simplefilter("ignore")
        library.impl("mm", mm, "CPU")
    return library
