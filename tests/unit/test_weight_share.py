"""Weights through memory that two processes see: on CPUs a file, which is gone afterwards."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from cluster.errors import StageError
from learners.shared_buffer import SharedBuffer, device_name, opened
from learners.weight_share import WeightShare, shared_tensors

CPU = torch.device("cpu")
MEMORY = "/dev/shm"


def test_a_buffer_is_seen_as_it_is_and_gone_when_closed() -> None:
    buffer = SharedBuffer(1000, CPU)
    handle = buffer.handle()
    path = Path(str(handle[0]))
    assert path.stat().st_mode & 0o077 == 0
    buffer.data.copy_(torch.arange(1000) % 251)
    seen = opened(handle, 1000, CPU)
    assert torch.equal(seen, buffer.data)
    buffer.close()
    assert not path.exists()
    with pytest.raises(RuntimeError):
        opened(handle, 1000, CPU)
    assert not path.exists(), "who opens makes none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_shared_is_the_weights_in_memory_of_their_own(dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Embedding(11, 3))
    share = WeightShare(module, dtype, CPU)
    told = share.open()
    assert told["device"] == device_name(CPU)
    received = dict(shared_tensors(told["manifest"], {told["device"]: told["handle"]}, CPU))
    share.close()
    assert not Path(told["handle"][0]).exists()
    assert list(received) == ["0.weight", "0.bias", "1.weight"]
    for name, parameter in module.named_parameters():
        assert torch.equal(received[name], parameter.detach().to(dtype))


def test_an_engine_that_shares_with_no_rank_is_told_so() -> None:
    share = WeightShare(torch.nn.Linear(2, 2), torch.float32, CPU)
    told = share.open()
    with pytest.raises(StageError, match="no learner rank shares the memory of cpu of"):
        shared_tensors(told["manifest"], {"another": told["handle"]}, CPU)
    share.close()


def test_a_copy_without_room_is_an_error_of_the_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    share = WeightShare(torch.nn.Linear(2, 2), torch.float32, CPU)
    with pytest.raises(StageError, match=r"^sync: .*nowhere"):
        share.open()
    share.close()


def test_more_than_the_memory_of_the_host_is_an_error_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = os.statvfs(MEMORY)
    size = 4 * host.f_frsize * host.f_blocks
    monkeypatch.setattr("learners.weight_share.num_bytes", lambda _manifest: size)
    share = WeightShare(torch.nn.Linear(2, 2), torch.float32, CPU)
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        with pytest.raises(StageError, match=r"^sync: .*No space left"):
            share.open()
        assert list(Path(place).iterdir()) == []
