"""On one GPU: memory that was offered by CUDA IPC comes back when it is closed, opened or not."""

import shutil

import pytest
import torch

from learners.shared_buffer import SharedBuffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here"),
]
SIZE = 64 * 1024**2


def test_what_nobody_opens_is_given_back() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.init()
    before = torch.cuda.memory_allocated(device)
    for _ in range(10):
        buffer = SharedBuffer(SIZE, device)
        assert torch.cuda.memory_allocated(device) >= before + SIZE
        buffer.handle()
        buffer.close()
        del buffer
        assert torch.cuda.memory_allocated(device) - before < SIZE
