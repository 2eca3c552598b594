"""Products by oneDNN equal those of float64, in any layout; what it does not take goes to torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learners import cpu_matmul

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "part of rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row": lambda x: x[:1].expand_as(x),
    "one number": lambda x: x[:1, :1].expand_as(x),
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.fixture(autouse=True)
def installed() -> None:
    assert cpu_matmul.install() is not None


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_values_in_any_layout(left: str, right: str) -> None:
    torch.manual_seed(0)
    a, b = LAYOUTS[left](torch.randn(70, 40)), LAYOUTS[right](torch.randn(40, 33))
    found = a @ b
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 64, 64), (64, 1, 64), (64, 64, 1), (0, 64, 64), (64, 0, 64)])
def test_small_and_empty_ones(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    a = torch.arange(64 * 64).remainder(7).view(64, 64)
    found = a.to(dtype) @ a.T.to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), (a.double() @ a.T.double()).to(dtype).double())


@pytest.mark.parametrize(
    ("rows", "dtype", "is_ours"),
    [(64, torch.float32, True), (8, torch.float32, False), (64, torch.bfloat16, False)],
)
def test_large_ones_are_of_onednn(rows: int, dtype: torch.dtype, is_ours: bool) -> None:
    a, b = torch.randn(rows, 64).to(dtype), torch.randn(64, 64).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        _ = a @ b
    names = [event.key for event in seen.key_averages()]
    assert ("mkldnn::_linear_pointwise" in names) == is_ours


def test_types_that_differ_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        torch.randn(64, 64) @ torch.randn(64, 64).double()
    with pytest.raises(RuntimeError, match="shapes"):
        torch.randn(64, 64) @ torch.randn(65, 64)
    with pytest.raises(RuntimeError, match="matrix"):
        torch.mm(torch.randn(40, 64, 64), torch.randn(64, 64))


def test_gradients_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 64, bias=False)
    x = torch.randn(2, 40, 48, requires_grad=True)
    exact = torch.nn.Linear(48, 64, bias=False).double()
    exact.weight.data.copy_(layer.weight)
    y = x.detach().double().requires_grad_()
    for weights in (torch.randn(2, 40, 64), torch.ones(1, 1, 1).expand(2, 40, 64)):
        ours = torch.autograd.grad((layer(x) * weights).sum(), (x, layer.weight))
        theirs = torch.autograd.grad((exact(y) * weights.double()).sum(), (y, exact.weight))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)


def test_a_product_is_the_same_bits_each_time() -> None:
    a, b = torch.randn(257, 96), torch.randn(96, 130)
    assert all(torch.equal(a @ b, a @ b) for _ in range(10))
