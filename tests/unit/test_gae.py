"""GAE: published values, any packing like each sequence alone, rewards put on the right tokens."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Plugin
from cluster.errors import ConfigError
from cluster.types import Trajectory, TrajectoryGroup, Verdict
from learners.batch import MicroBatch, Row
from learners.credit import ValueBased, build_credit, whitening_of
from learners.gae import GeneralizedAdvantage
from learners.segments import discounted_sums
from tests.group_cases import make_groups
from tests.loss_cases import rows_of

REWARDS, VALUES = [0.0, 0.0, 1.0], [0.2, 0.5, 0.6]


def _estimate(
    credit: GeneralizedAdvantage,
    rewards: list[list[float]],
    values: list[list[float]],
    truncated: list[bool] | None = None,
    guided: list[bool] | None = None,
) -> tuple[list[float], list[float]]:
    rows = rows_of(rewards, guided=guided, truncated=truncated)
    rows = credit.estimate(replace(rows, values=torch.tensor([v for row in values for v in row])))
    assert rows.returns is not None
    return rows.advantages.tolist(), rows.returns.tolist()


@pytest.mark.parametrize(
    ("of_policy", "of_critic", "advantages", "returns"),
    [
        (0.95, 0.95, [0.756, 0.48, 0.4], [0.956, 0.98, 1.0]),
        (1.0, 1.0, [0.8, 0.5, 0.4], [1.0, 1.0, 1.0]),
        (0.95, 1.0, [0.756, 0.48, 0.4], [1.0, 1.0, 1.0]),
        (0.0, 0.0, [0.3, 0.1, 0.4], [0.5, 0.6, 1.0]),
    ],
)
def test_published_values(
    of_policy: float, of_critic: float, advantages: list[float], returns: list[float]
) -> None:
    credit = GeneralizedAdvantage(lambda_policy=of_policy, lambda_critic=of_critic)
    ours = _estimate(credit, [REWARDS], [VALUES])
    assert ours[0] == pytest.approx(advantages)
    assert ours[1] == pytest.approx(returns)


def test_a_discount_shortens_the_sight() -> None:
    credit = GeneralizedAdvantage(gamma=0.5, lambda_policy=0.5)
    deltas = [0.25 - 0.2, 0.3 - 0.5, 1.0 - 0.6]
    assert _estimate(credit, [REWARDS], [VALUES])[0] == pytest.approx(
        [deltas[0] + 0.25 * deltas[1] + 0.0625 * deltas[2], deltas[1] + 0.25 * deltas[2], deltas[2]]
    )
    assert _estimate(credit, [REWARDS], [VALUES])[1] == pytest.approx([0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    ("bootstrap", "advantages"),
    [(True, [0.395, 0.1, 0.0]), (False, [-0.1465, -0.47, -0.6])],
)
def test_published_values_of_a_truncated_row(bootstrap: bool, advantages: list[float]) -> None:
    credit = GeneralizedAdvantage(lambda_critic=0.95, bootstrap_truncated=bootstrap)
    assert _estimate(credit, [[0.0] * 3], [VALUES], truncated=[True])[0] == pytest.approx(
        advantages
    )
    whole = GeneralizedAdvantage(bootstrap_truncated=bootstrap)
    assert _estimate(whole, [[0.0] * 3], [VALUES], truncated=[False])[0] == pytest.approx(
        [-0.1465, -0.47, -0.6]
    )


@pytest.mark.parametrize(
    ("length", "expected"), [(3, 0.0), (20, 0.0), (21, 0.047619), (400, 0.95), (8000, 0.9975)]
)
def test_published_lambdas_of_a_length(length: int, expected: float) -> None:
    credit = GeneralizedAdvantage(length_alpha=0.05)
    rewards = [0.0] * (length - 1) + [1.0]
    advantages, returns = _estimate(credit, [rewards], [[0.0] * length])
    assert advantages[-2] == pytest.approx(expected, abs=1e-6)
    assert returns[0] == 1.0, "the critic's lambda stays"


def test_tokens_of_others_are_stepped_over() -> None:
    trajectory = _trajectory(length=4, written=[0, 1, 3], reward=1.0)
    credit = GeneralizedAdvantage()
    [rewards] = credit.assign(_group([trajectory]))
    assert rewards is not None
    assert rewards.tolist() == [0, 0, 0, 1]
    pack = _packed(trajectory, rewards)
    assert pack.num_loss_tokens == 3
    pack = credit.estimate(replace(pack, values=torch.tensor(VALUES)))
    assert pack.advantages.tolist() == pytest.approx([0.756, 0.48, 0.4])


def test_rewards_lie_on_the_last_written_token_before_their_end() -> None:
    verdict = Verdict(name="prm", score=1.0, step_scores=[(1, 8.0), (3, 4.0), (5, 2.0)])
    trajectory = msgspec.structs.replace(
        _trajectory(length=6, written=[1, 2, 4], reward=1.0), verdicts=[verdict]
    )
    unjudged = _trajectory(length=6, written=[1], reward=1.0)
    unrewarded = msgspec.structs.replace(trajectory, reward=None)
    unaligned = msgspec.structs.replace(trajectory, verdicts=[Verdict(name="prm", score=0.5)])
    credit = GeneralizedAdvantage(process_signal="prm", process_weight=0.5)
    rewards, *others = credit.assign(_group([trajectory, unjudged, unrewarded, unaligned]))
    assert rewards is not None
    assert rewards.tolist() == [0, 0, 2, 0, 2, 0], "the first step is not of the policy's making"
    assert others == [None, None, None]


def test_kl_to_the_reference_is_in_the_reward() -> None:
    credit = GeneralizedAdvantage(kl_coefficient=0.1, lambda_policy=1.0)
    assert credit.needs_reference
    rows = rows_of([[0, 0, 1], [0, 1]], [[-1, -2, -3], [-1, -1]], guided=[False, True])
    rows = replace(rows, values=torch.zeros(5), ref_logprobs=torch.tensor([-2.0, -2, -2, -9, -9]))
    gaps = [1, 0, -1]
    expected = [1 - 0.1 * sum(gaps[t:]) for t in range(3)]
    assert credit.estimate(rows).advantages.tolist() == pytest.approx([*expected, 1, 1])


def test_hinted_rows_see_the_outcome_alone() -> None:
    credit = GeneralizedAdvantage(lambda_policy=0.0, lambda_critic=0.0)
    advantages, _ = _estimate(credit, [REWARDS, REWARDS], [VALUES, VALUES], guided=[True, False])
    assert advantages == pytest.approx([0.8, 0.5, 0.4, 0.3, 0.1, 0.4])


def test_a_cut_hinted_row_takes_no_value_of_another_context() -> None:
    credit = GeneralizedAdvantage(lambda_policy=1.0, bootstrap_truncated=True)
    advantages, _ = _estimate(credit, [[0.0] * 3] * 2, [VALUES] * 2, [True, True], [True, False])
    assert advantages == pytest.approx([-0.2, -0.5, -0.6, 0.4, 0.1, 0.0])


SEQUENCES = st.lists(
    st.lists(st.tuples(*[st.floats(-2, 2, width=32)] * 2), max_size=9), min_size=1, max_size=5
)


@given(sequences=SEQUENCES, gamma=st.floats(0, 1), lambdas=st.tuples(*[st.floats(0, 1)] * 2))
def test_any_packing_gives_what_a_plain_loop_gives(
    sequences: list[list[tuple[float, float]]], gamma: float, lambdas: tuple[float, float]
) -> None:
    credit = GeneralizedAdvantage(gamma, *lambdas)
    rewards, values = ([[pair[i] for pair in row] for row in sequences] for i in range(2))
    advantages, returns = _estimate(credit, rewards, values)
    for decay, offset, ours in ((lambdas[0], 0.0, advantages), (lambdas[1], 1.0, returns)):
        expected: list[float] = []
        for row in sequences:
            later, following, backwards = 0.0, 0.0, []
            for reward, value in reversed(row):
                later = reward + gamma * following - value + gamma * decay * later
                following = value
                backwards.append(later + offset * value)
            expected += backwards[::-1]
        assert ours == pytest.approx(expected, abs=1e-5)


def test_discounted_sums_of_two_sequences() -> None:
    rows = rows_of([[1, 1, 1], [2, 2]])
    factors = torch.full((5,), 0.5)
    assert discounted_sums(rows.advantages, factors, rows).tolist() == [1.75, 1.5, 1, 3, 2]


def test_settings_come_from_the_config() -> None:
    credit = build_credit(Plugin(use="gae"))
    assert isinstance(credit, ValueBased)
    assert not isinstance(build_credit(Plugin(use="grpo")), ValueBased)
    assert whitening_of(credit) == "tokens"
    assert whitening_of(GeneralizedAdvantage(whitening=False)) == "none"
    for settings, message in (
        ({"gamma": 1.1}, "gamma must be in"),
        ({"length_alpha": 0}, "length_alpha must be positive"),
        ({"kl_coefficient": -1}, "kl_coefficient must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=rf"objective\.credit.*{message}"):
            build_credit(Plugin(use="gae", settings=settings))


def _trajectory(length: int, written: list[int], reward: float) -> Trajectory:
    any_one = make_groups(0)[0].trajectories[0]
    loss_mask = np.zeros(length, dtype=bool)
    loss_mask[written] = True
    return msgspec.structs.replace(
        any_one,
        token_ids=np.zeros(length, dtype=np.int32),
        loss_mask=loss_mask,
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        version_spans=[],
        reward=reward,
    )


def _group(trajectories: list[Trajectory]) -> TrajectoryGroup:
    return msgspec.structs.replace(make_groups(0)[0], trajectories=trajectories)


def _packed(trajectory: Trajectory, rewards: np.ndarray) -> MicroBatch:
    return MicroBatch.pack([Row.of(trajectory, rewards)])
