"""Per-sequence reductions: any packing gives what each sequence alone gives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.segments import (
    quantile,
    reverse_sums,
    sequence_means,
    sequence_quantiles,
    sequence_sums,
)
from tests.loss_cases import rows_of

SEQUENCES = st.lists(
    st.lists(st.floats(-5, 5, width=32), min_size=0, max_size=12), min_size=1, max_size=6
)


@given(sequences=SEQUENCES, fraction=st.floats(0, 1))
def test_reductions_equal_numpy_on_each_sequence(
    sequences: list[list[float]], fraction: float
) -> None:
    rows = rows_of(sequences)
    values = torch.tensor([v for row in sequences for v in row], dtype=torch.float64)
    sums, means = sequence_sums(values, rows), sequence_means(values, rows)
    quantiles = sequence_quantiles(values, rows, fraction)
    later = reverse_sums(values, rows).split([len(row) for row in sequences])
    for i, row in enumerate(sequences):
        assert sums[i].item() == pytest.approx(sum(row), abs=1e-9)
        assert means[i].item() == pytest.approx(np.mean(row) if row else 0.0, abs=1e-9)
        expected = np.quantile(row, fraction) if row else 0.0
        assert quantiles[i].item() == pytest.approx(expected, abs=1e-5)
        assert later[i].tolist() == pytest.approx(np.cumsum(row[::-1])[::-1].tolist(), abs=1e-9)


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), fraction=st.floats(0, 1)
)
def test_a_quantile_of_all_equals_numpy(values: list[float], fraction: float) -> None:
    ours = quantile(torch.tensor(values, dtype=torch.float64), fraction)
    assert ours == pytest.approx(np.quantile(values, fraction), abs=2e-5)
