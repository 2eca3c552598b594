"""A trajectory token by token, for people: text, entropy, advantage, version, SIREN's peaks.

Invariant: nothing of it is trained on. Entropies are those of the policy as it is when asked, at
the temperature of the rollout; the advantage is the credit's own, with the values of the critic, if
there is one, as it is when asked, and before any whitening over the batch; tokens that the policy
did not write have none. Called by the learner for the few trajectories that a run keeps to look at.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from cluster.run_dir import TokenColumns
from cluster.types import Trajectory, TrajectoryGroup
from learners.batch import MicroBatch, Row
from learners.credit import Credit
from learners.model import PolicyModel
from learners.objectives import WeightedLosses
from learners.siren import Siren
from learners.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 4


class TokenViewer:
    """Example: `[columns] = viewer([(group, 0)])`."""

    def __init__(
        self,
        policy: PolicyModel,
        policy_dir: Path,
        losses: WeightedLosses,
        credit: Credit,
        annotated: Callable[[MicroBatch], MicroBatch],
        device: torch.device,
    ) -> None:
        """`annotated` finishes the credit of a pack; collective."""
        self._policy = policy
        self._policy_dir = policy_dir
        self._credit = credit
        self._annotated = annotated
        self._device = device
        self._siren = next((o for o in losses.objectives if isinstance(o, Siren)), Siren())

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self._policy_dir)

    @torch.no_grad()
    def __call__(self, chosen: Sequence[tuple[TrajectoryGroup, int]]) -> list[TokenColumns]:
        """The trajectory of each (group, index); one forward pass each and those that finish its
        credit, collective.
        """
        views = [
            self._columns(group.trajectories[index], self._credit.assign(group)[index])
            for group, index in chosen
        ]
        cast(FSDPModule, self._policy).reshard()
        return views

    def _columns(self, trajectory: Trajectory, credit: np.ndarray | None) -> TokenColumns:
        """`credit` [L] is what was assigned, None where the trajectory was left out."""
        length = len(trajectory.token_ids)
        assigned = np.zeros(length, dtype=np.float32) if credit is None else credit
        rows = MicroBatch.pack([Row.of(trajectory, assigned)], self._device)
        if credit is not None:
            rows = self._annotated(rows)
        outputs = self._policy(rows, self._siren.nucleus)
        entropies: list[float | None] = [None] * length
        advantages, peaks = [0.0] * length, [False] * length
        columns = (outputs.entropy, rows.advantages, self._siren.is_peak(rows, outputs))
        written = np.flatnonzero(trajectory.loss_mask).tolist()
        for place, entropy, advantage, is_peak in zip(
            written, *(column.tolist() for column in columns), strict=True
        ):
            entropies[place], advantages[place] = round(entropy, DIGITS), round(advantage, DIGITS)
            peaks[place] = is_peak
        versions = np.zeros(length, dtype=np.int64)
        for span in trajectory.version_spans:
            versions[span.start : span.end] = span.policy_version
        return TokenColumns(
            texts=token_texts(self._tokenizer, trajectory.token_ids.tolist()),
            entropies=entropies,
            advantages=advantages,
            policy_versions=versions.tolist(),
            is_peak=peaks,
        )


def token_texts(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> list[str]:
    """The text of each token; a character that takes several tokens stands at its last one."""
    texts: list[str] = []
    waiting: list[int] = []
    for number, token_id in enumerate(token_ids, start=1):
        waiting.append(token_id)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        is_whole = not text.endswith("\ufffd") or number == len(token_ids) or len(waiting) > 3
        texts.append(text if is_whole else "")
        waiting = [] if is_whole else waiting
    return texts
