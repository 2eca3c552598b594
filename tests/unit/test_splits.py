"""An update is the same however its sequences lie in packs, micro-batches and ranks."""

from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.config import LossConfig, ObjectiveSection
from learners.aggregation import Denominator
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.objectives import WeightedLosses
from tests.loss_cases import rows_of

ROLLOUT = -1.0  # log-prob of every token by the engine
MICROBATCHES = 3  # of each rank, some without a row

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "token_mean": ("policy_gradient", {}),
    "seq_mean_token_mean": ("policy_gradient", {"aggregation": "seq_mean_token_mean"}),
    "constant": ("policy_gradient", {"aggregation": "constant", "constant": 7}),
    "filtered": ("policy_gradient", {"token_filter": {"use": "forking_tokens"}}),
    "gspo": ("gspo", {"ratio_to": "rollout", "clip_low": 0.2, "clip_high": 0.2}),
    "cispo": ("cispo", {}),
    "gmpo": ("gmpo", {}),
    "kl": ("kl", {"estimator": "k1_reward", "off_policy": True}),
    "sapo": ("sapo", {}),
    "guide": ("guide", {}),
    "siren": ("siren", {"anchor": 0.5, "beta": 1.0}),
}


class Token(NamedTuple):
    advantage: float
    gap: float  # learner - rollout
    entropy: float


class Sequence(NamedTuple):
    is_guided: bool
    tokens: list[Token]


NUMBERS = [st.floats(low, high, width=32) for low, high in ((-2, 2), (-1, 1), (0, 3))]
SEQUENCES = st.lists(
    st.builds(Sequence, st.booleans(), st.lists(st.builds(Token, *NUMBERS), max_size=5)),
    min_size=1,
    max_size=6,
)


class Leaves(NamedTuple):
    """What has a gradient, of one sequence."""

    logprobs: Tensor
    entropy: Tensor


def _leaves(sequence: Sequence) -> Leaves:
    def leaf(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    tokens = sequence.tokens
    return Leaves(leaf([ROLLOUT + t.gap for t in tokens]), leaf([t.entropy for t in tokens]))


def _pack(sequences: list[Sequence], leaves: list[Leaves]) -> tuple[MicroBatch, TokenOutputs]:
    rows = rows_of(
        [[token.advantage for token in s.tokens] for s in sequences],
        [[ROLLOUT] * len(s.tokens) for s in sequences],
        [s.is_guided for s in sequences],
    )
    nothing = Leaves(*[torch.zeros(0, dtype=torch.float64)] * 2)
    logprobs, entropy = (torch.cat(parts) for parts in zip(nothing, *leaves, strict=True))
    rows = replace(rows, ref_logprobs=rows.rollout_logprobs - 0.3)
    return rows, TokenOutputs(logprobs, entropy, entropy)


def _update(
    use: str, values: dict[str, Any], sequences: list[Sequence], ranks: list[list[list[int]]]
) -> tuple[dict[str, float], list[list[float]]]:
    """Metrics and the gradients of each sequence; `ranks` holds, for each rank and micro-batch, the
    numbers of its sequences.
    """
    losses = WeightedLosses(ObjectiveSection(losses={"loss": LossConfig(use=use, settings=values)}))
    leaves = [_leaves(sequence) for sequence in sequences]
    packs = [
        _pack([sequences[i] for i in part], [leaves[i] for i in part])
        for rank in ranks
        for part in rank
    ]
    tables: dict[str, list[Tensor]] = {}
    for rows, outputs in packs:
        for name, table in losses.survey(rows, outputs).items():
            tables.setdefault(name, []).append(table)
    metrics = losses.begin({name: torch.cat(parts) for name, parts in tables.items()})
    counts: dict[Denominator, float] = {
        "tokens": float(sum(rows.num_loss_tokens for rows, _ in packs)),
        "sequences": float(sum(rows.num_sequences for rows, _ in packs)),
    }
    for rows, outputs in packs:
        found = losses.sums(rows, outputs, counts)
        if found.total.requires_grad:
            found.total.backward()
        sums = {name: (mean.total, mean.count) for name, mean in found.means.items()}
        sums |= {name: (value, 0) for name, value in found.losses.items()}
        for name, values in sums.items():
            for kind, value in zip(("", " of"), values, strict=True):
                metrics[name + kind] = metrics.get(name + kind, 0.0) + float(value)
        metrics["largest gap"] = max(metrics.get("largest gap", 0.0), found.largest_gap.item())
    gradients = [leaf.grad for pair in leaves for leaf in pair]
    return metrics, [[] if gradient is None else gradient.tolist() for gradient in gradients]


@pytest.mark.parametrize("case", list(LOSSES))
@given(sequences=SEQUENCES, num_ranks=st.integers(1, 4), chance=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_splits_ranks_and_packing_change_nothing(
    case: str, sequences: list[Sequence], num_ranks: int, chance: Random
) -> None:
    order = chance.sample(range(len(sequences)), len(sequences))
    ranks: list[list[list[int]]] = [[[] for _ in range(MICROBATCHES)] for _ in range(num_ranks)]
    for index in order:
        ranks[chance.randrange(num_ranks)][chance.randrange(MICROBATCHES)].append(index)
    whole = [[list(range(len(sequences)))]]
    use, values = LOSSES[case]
    metrics, gradients = _update(use, values, sequences, whole)
    split_metrics, split_gradients = _update(use, values, sequences, ranks)
    assert split_metrics == pytest.approx(metrics, abs=1e-6)
    for one, other in zip(gradients, split_gradients, strict=True):
        assert other == pytest.approx(one, abs=1e-9)
