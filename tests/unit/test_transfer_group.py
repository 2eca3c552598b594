"""The learner's end of a broadcast and members of its group, over gloo on loopback, each in a
thread of this process: weights arrive, and whoever fails lets the others go.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import StageError
from learners.rendezvous import find_store
from learners.transfer_group import TransferGroup
from learners.weight_sender import WeightSender
from learners.weight_stream import unpacked

CPU = torch.device("cpu")
LONG_S = 60.0
PROMPT_S = 20.0  # on a busy machine; far from LONG_S


class Group:
    """A sender of a small real module, and `num_receivers` members that have met it."""

    def __init__(self, num_receivers: int, timeout_s: float = LONG_S) -> None:
        self.module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
        self.sender = WeightSender(self.module, torch.bfloat16, CPU, is_sender=True)
        self.sender.bucket_bytes = 24  # less than a tensor has
        host, port = self.sender.open("127.0.0.1", timeout_s)
        size = 1 + num_receivers

        def meet(rank: int) -> TransferGroup:
            store = find_store(host, port, timeout_s)
            return TransferGroup(store, rank, size, CPU, timeout_s)

        self.pool = ThreadPoolExecutor(size)
        joining = self.pool.submit(self.sender.join, size)
        meeting = [self.pool.submit(meet, rank) for rank in range(1, size)]
        self.update: dict[str, Any] = joining.result()
        self.members = [future.result() for future in meeting]

    def receive(self, member: TransferGroup) -> list[tuple[str, Tensor]]:
        member.start()
        return list(
            unpacked(self.update["manifest"], self.update["bucket_bytes"], CPU, member.receive)
        )

    def close(self) -> None:
        self.sender.close()
        for member in self.members:
            member.close()
        self.pool.shutdown()


def test_every_member_receives_the_weights_time_after_time() -> None:
    group = Group(2)
    for _ in range(2):
        with torch.no_grad():
            for parameter in group.module.parameters():
                parameter.normal_()
        receiving = [group.pool.submit(group.receive, member) for member in group.members]
        group.sender.send()
        for future in receiving:
            received = dict(future.result())
            assert list(received) == ["0.weight", "0.bias", "1.weight"]
            for name, parameter in group.module.named_parameters():
                assert torch.equal(received[name], parameter.detach().bfloat16())
    group.close()


def test_a_member_that_leaves_ends_the_transfer_for_all_at_once() -> None:
    group = Group(2)
    leaving, staying = group.members
    waiting = group.pool.submit(group.receive, staying)
    leaving.close()
    started = time.monotonic()
    with pytest.raises(StageError, match="sync"):
        group.sender.send()
    with pytest.raises(StageError, match="sync"):
        waiting.result()
    assert time.monotonic() - started < PROMPT_S
    with pytest.raises(StageError, match="no group of engines has met"):
        group.sender.send()
    group.close()


def test_a_member_that_hangs_holds_the_others_up_no_longer_than_the_deadline() -> None:
    group = Group(2, timeout_s=2.0)
    _hanging, waiting = group.members
    future = group.pool.submit(group.receive, waiting)
    started = time.monotonic()
    with pytest.raises(StageError, match="sync"):
        group.sender.send()
    with pytest.raises(StageError, match="sync"):
        future.result()
    assert time.monotonic() - started < PROMPT_S
    group.close()


def test_weights_unlike_the_manifest_are_named_and_not_sent() -> None:
    group = Group(1)
    group.module[0] = nn.Linear(7, 6)
    [member] = group.members
    bucket = torch.zeros(24, dtype=torch.uint8)
    receiving = group.pool.submit(member.receive, bucket)
    expected = r"0\.weight \(bfloat16 \[6, 7\]\) for 0\.weight \(bfloat16 \[5, 7\]\)"
    with pytest.raises(StageError, match=expected):
        group.sender.send()
    with pytest.raises(StageError):
        receiving.result()
    assert not bucket.any()
    group.close()


def test_whoever_waits_for_a_group_that_does_not_meet_is_let_go() -> None:
    sender = WeightSender(nn.Linear(2, 2), torch.float32, CPU, is_sender=True)
    sender.open("127.0.0.1", 1.0)
    started = time.monotonic()
    with pytest.raises(StageError, match="sync"):
        sender.join(2)
    assert time.monotonic() - started < PROMPT_S


def test_the_port_is_open_on_its_one_address() -> None:
    sender = WeightSender(nn.Linear(2, 2), torch.float32, CPU, is_sender=True)
    host, port = sender.open("127.0.0.1", 5.0)
    listening = [line.split()[1] for line in open("/proc/net/tcp").readlines()[1:]]  # noqa: SIM115
    found = [address for address in listening if address.endswith(f":{port:04X}")]
    assert host == "127.0.0.1"
    assert "0100007F" in {address.split(":")[0] for address in found}
    assert "00000000" not in {address.split(":")[0] for address in found}
    sender.close()
