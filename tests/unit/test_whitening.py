"""Whitening over the global batch on a real process group, split over packs."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from learners.whitening import whiten
from tests.loss_cases import rows_of

CENTERED = [0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]
LENGTHS = [2, 4, 4, 6], [3, 3, 5, 5]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# TV-RF
def test_published_values_of_one_token_rows() -> None:
    packs = [rows_of([[a] for a in group]) for group in CENTERED]
    first, second = (
        pack.advantages.tolist() for pack in whiten([*packs, rows_of([])], "tokens")[:2]
    )
    assert first == pytest.approx([1.620185, -0.540062, -0.540062, -0.540062], abs=1e-5)
    assert second == pytest.approx([0.540062, 0.540062, 0.540062, -1.620185], abs=1e-5)


# TV-RF
def test_tokens_weight_by_length_and_sequences_do_not() -> None:
    packs = [
        rows_of([[a] * n for a, n in zip(group, lengths, strict=True)])
        for group, lengths in zip(CENTERED, LENGTHS, strict=True)
    ]
    by_token = whiten(packs, "tokens")[0].advantages
    assert by_token[0].item() == pytest.approx(
        (0.75 + 0.09375) / (0.163086 * 32 / 31) ** 0.5, abs=1e-4
    )
    assert torch.cat([p.advantages for p in whiten(packs, "tokens")]).mean().abs() < 1e-6
    by_sequence = whiten(packs, "sequences")[0].advantages
    assert by_sequence[0].item() == pytest.approx(1.620185, abs=1e-5)


# TV-C7
def test_published_values_of_gae_advantages() -> None:
    [pack] = whiten([rows_of([[0.756, 0.48, 0.4]])], "tokens")
    assert pack.advantages.tolist() == pytest.approx([1.127910, -0.349795, -0.778115], abs=1e-5)


def test_too_little_to_compare_gives_zero() -> None:
    assert whiten([rows_of([[3.0]])], "tokens")[0].advantages.tolist() == [0.0]
    assert whiten([rows_of([])], "sequences")[0].advantages.tolist() == []
