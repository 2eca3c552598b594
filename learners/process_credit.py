"""Step-level credit: scores of a process verifier at the ends of reasoning steps.

Invariant: a token is credited with what happens at or after it, never with what came before, nor
compared with steps that were given and are not learned; a trajectory whose step scores are unknown
gets none. An alternative to the outcome credits of `learners.credit`.
"""

from typing import NamedTuple

import numpy as np

from cluster.types import Trajectory, TrajectoryGroup


class _Known(NamedTuple):
    steps: list[tuple[int, float]]
    reward: float  # 0 where outcomes have no weight


class ProcessNormalized:
    """Sum of the normalised step scores at or after each token (GRPO with process supervision,
    arXiv 2402.03300, section 4.1.3).

    `signal` names the verifier whose verdicts carry `step_scores` [(token_end, score)]; all scores
    of the group are normalised together by their mean and unbiased std. `outcome_weight` adds
    that multiple of the group-normalised reward to every token. Scores 1 at token 2 and 0 at
    token 4 of a lone trajectory give [0, 0, -.707, -.707].
    """

    is_per_token = True

    def __init__(self, signal: str, outcome_weight: float = 0.0, epsilon: float = 1e-6) -> None:
        self._signal = signal
        self._outcome_weight = outcome_weight
        self._epsilon = epsilon

    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]:
        known = [self._known(trajectory) for trajectory in group.trajectories]
        scores = [score for found in known if found for _, score in found.steps]
        center, scale = self._moments(np.array(scores))
        outcome, outcome_scale = self._moments(np.array([found.reward for found in known if found]))
        result: list[np.ndarray | None] = []
        for trajectory, found in zip(group.trajectories, known, strict=True):
            if found is None:
                result.append(None)
                continue
            advantages = np.zeros(len(trajectory.token_ids), dtype=np.float64)
            for token_end, score in found.steps:
                advantages[:token_end] += (score - center) / scale
            advantages += self._outcome_weight * (found.reward - outcome) / outcome_scale
            result.append(advantages.astype(np.float32))
        return result

    def _known(self, trajectory: Trajectory) -> "_Known | None":
        """None leaves a trajectory out of its own credit and of its siblings'."""
        steps = step_scores(trajectory, self._signal)
        if steps is not None and trajectory.loss_mask.any():
            start = int(np.argmax(trajectory.loss_mask))
            steps = [(end, score) for end, score in steps if end > start]
        reward = trajectory.reward if self._outcome_weight else 0.0
        return None if steps is None or reward is None else _Known(steps, reward)

    def _moments(self, values: np.ndarray) -> tuple[float, float]:
        """Center and scale; values without contrast are all at the center."""
        if len(values) < 2 or np.ptp(values) == 0:
            return (float(values[0]) if len(values) else 0.0), 1.0
        return float(values.mean()), float(values.std(ddof=1) + self._epsilon)


def step_scores(trajectory: Trajectory, signal: str) -> list[tuple[int, float]] | None:
    """Scores of the steps by verifier `signal`; None where it abstained, or could not say at which
    tokens the steps end.
    """
    for verdict in trajectory.verdicts:
        if verdict.name == signal and verdict.score is not None and verdict.step_scores:
            return verdict.step_scores
    return None
