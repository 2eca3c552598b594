"""The vLLM weight-transfer backend: engines take weights from a safetensors file, from memory that
they share with the learner, or from a broadcast, whichever an update names.

Invariant: after `finish_weight_update` every tensor of the engine, the prepacked CPU `lm_head`
included, equals what was published; after an update that failed the next one can start. Registered
in every engine process through the `vllm.general_plugins` entry point (see pyproject.toml); the
control calls come from `actors.vllm_engine`. The file may lie in shared memory (one machine) or on
a shared file system (several). The learner's ends of the others are `learners.weight_share` and
`learners.weight_sender`.
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
from vllm.utils.nccl import unpinned_nccl_env

from learners.rendezvous import find_store
from learners.shared_buffer import Handle
from learners.transfer_group import TransferGroup
from learners.weight_share import shared_tensors
from learners.weight_stream import Entry, unpacked

BACKEND = "hone"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The group to become a member of, and where it meets; without a size there is none, and only
    files can be taken. Worker r of the engine is member `rank_offset` + r.
    """

    size: int = 0
    rank_offset: int = 0
    host: str = ""
    port: int = 0
    timeout_s: float = 0.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`path` of a file; or what lies in memory that ranks share, whose `handles` go by device; or
    else what the group is about to be sent.
    """

    path: str | None = None
    manifest: list[Entry] | None = None
    handles: dict[str, Handle] | None = None
    bucket_bytes: int = 0


class HoneWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Worker side of the `hone` backend, one per vLLM worker process."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: TransferGroup | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Leave the group before and meet the next."""
        self.shutdown()
        if not init_info.size:
            return
        store = find_store(init_info.host, init_info.port, init_info.timeout_s)
        rank = init_info.rank_offset + self.parallel_config.rank
        with unpinned_nccl_env():  # the learner knows nothing of what vLLM sets for its own groups
            self._group = TransferGroup(
                store, rank, init_info.size, self.device, init_info.timeout_s
            )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Unlike the base class it synchronizes no accelerator where there is none."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.shutdown()  # the others shall not wait
            # Half-loaded layers would count what they have got towards the next update.
            finalize_layerwise_reload(self.model, self.model_config)
            raise
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.path is not None:
            tensors = _tensors(update_info.path)
        elif update_info.manifest is not None and update_info.handles is not None:
            tensors = shared_tensors(update_info.manifest, update_info.handles, self.device)
        else:
            tensors = self._broadcast(update_info)
        self.model.load_weights(tensors)  # pyright: ignore[reportCallIssue]

    def _broadcast(self, update_info: UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        if self._group is None or update_info.manifest is None:
            raise ValueError("an update without a path needs a manifest and a group that has met")
        self._group.start()
        return unpacked(
            update_info.manifest, update_info.bucket_bytes, self.device, self._group.receive
        )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_prepacked_head(self.model)

    def shutdown(self) -> None:
        """Leave the group, if it is in one."""
        if self._group is not None:
            self._group.close()
        self._group = None


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
            BACKEND, __name__, HoneWeightTransferEngine.__name__
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
