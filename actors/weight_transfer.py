"""The vLLM weight-transfer backend for machines without NCCL: engines load a published
safetensors file.

Invariant: after `finish_weight_update` every tensor of the engine, the prepacked CPU `lm_head`
included, equals the published file. Registered in every engine process through the
`vllm.general_plugins` entry point (see pyproject.toml); the control calls come from
`actors.vllm_engine`. The file may lie in shared memory (one machine) or on a shared file system
(several); a dead engine can never block the publisher.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "shared_file"


@dataclass
class SharedFileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the path travels with each update."""


@dataclass
class SharedFileUpdateInfo(WeightTransferUpdateInfo):
    path: str


class SharedFileWeightTransferEngine(
    WeightTransferEngine[SharedFileInitInfo, SharedFileUpdateInfo]
):
    """Worker side of the `shared_file` backend, one per vLLM worker process."""

    init_info_cls = SharedFileInitInfo
    update_info_cls = SharedFileUpdateInfo

    def init_transfer_engine(self, init_info: SharedFileInitInfo) -> None:
        del init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one published file. The base class would synchronize an accelerator, which a CPU
        lacks.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedFileUpdateInfo) -> None:
        self.model.load_weights(_tensors(update_info.path))  # pyright: ignore[reportCallIssue]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_prepacked_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def refresh_prepacked_head(model: torch.nn.Module) -> None:
    """Prepack the output head again after a reload.

    With tied embeddings on CPU the reload leaves `lm_head` with the packed copy of its old
    weights, and the engine samples from a mixture of new body and old head (log-prob errors of
    0.5 to 1 nat).
    """
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if head is not None and method is not None and head.weight.device.type == "cpu":
        method.process_weights_after_loading(head)


def register() -> None:
    """Entry point `vllm.general_plugins`: called by vLLM in each of its processes."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        _end_with_parent()
        WeightTransferEngineFactory.register_engine(
            BACKEND, __name__, SharedFileWeightTransferEngine.__name__
        )


def _end_with_parent() -> None:
    """An engine process must not outlive the actor above it, which kill -9 gives no time to end
    it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)
