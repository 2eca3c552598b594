"""The packing plan: which rank processes which trajectory in which micro-batch.

Invariant: the plan depends on the lengths alone, so it is the same wherever it is made; every rank
gets the same number of micro-batches (some may be empty), because each one runs the same
collectives. Made centrally from group headers, carried out by each rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.types import GroupHeader

Share = list[list[int]]  # one rank's micro-batches, each a list of sequence indices


@dataclass(frozen=True)
class TrajectoryRef:
    group_id: str
    index: int  # in the group


@dataclass(frozen=True)
class PackingPlan:
    """`microbatches[rank][i]` are the trajectories of micro-batch i on that rank; `minibatches[i]`
    is the update of the step that micro-batch i belongs to, on all ranks.
    """

    microbatches: list[list[list[TrajectoryRef]]]
    minibatches: list[int]

    def group_ids(self, rank: int) -> list[str]:
        """Groups that `rank` needs, each once, in the order of first use."""
        refs = (ref for microbatch in self.microbatches[rank] for ref in microbatch)
        return list(dict.fromkeys(ref.group_id for ref in refs))


def plan_groups(
    headers: Sequence[GroupHeader],
    world_size: int,
    max_tokens: int,
    num_minibatches: int = 1,
    num_before: int = 0,
) -> PackingPlan:
    """The plan of these groups; `max_tokens` is `learner.microbatch_tokens`.

    The groups of a step are dealt to its mini-batches in turn; `num_before` of them were planned
    already. So a mini-batch holds the same groups on any number of ranks.
    """
    plan = PackingPlan([[] for _ in range(world_size)], [])
    for minibatch in range(num_minibatches):
        dealt = [
            header
            for i, header in enumerate(headers, num_before)
            if i % num_minibatches == minibatch
        ]
        refs = [TrajectoryRef(h.group_id, i) for h in dealt for i in range(len(h.num_tokens))]
        lengths = [length for header in dealt for length in header.num_tokens]
        shares = assign(lengths, world_size, max_tokens)
        for rank, share in enumerate(shares):
            plan.microbatches[rank].extend([refs[i] for i in part] for part in share)
        plan.minibatches.extend([minibatch] * len(shares[0]))
    return plan


def assign(lengths: Sequence[int], world_size: int, max_tokens: int) -> list[Share]:
    """One share per rank: longest first to the least loaded rank, then cut where the budget ends.

    A sequence longer than `max_tokens` gets a micro-batch of its own. Neighbours have similar
    lengths, which attention that pads them profits from. Lengths [5, 3, 2] on two ranks with budget
    6: [[0]] and [[1, 2]].
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        ranks[rank].append(index)
        loads[rank] += lengths[index]
    shares = [_cut(indices, lengths, max_tokens) for indices in ranks]
    most = max(len(share) for share in shares)
    return [share + [[] for _ in range(most - len(share))] for share in shares]


def _cut(indices: list[int], lengths: Sequence[int], max_tokens: int) -> Share:
    """Consecutive runs of `indices` (longest first) that fit the budget."""
    share: Share = []
    num_tokens = 0
    for index in indices:
        num_tokens += lengths[index]
        if share and num_tokens <= max_tokens:
            share[-1].append(index)
        else:
            share.append([index])
            num_tokens = lengths[index]
    return share
