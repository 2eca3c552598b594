"""What is slow about starting an engine on CPU: nearly all of the seconds until it serves are
imports, once in its actor, and once more in the process that vLLM starts for it. Here both go side
by side: a fork server imports the modules of that process, which is then a copy of it.

Invariant: nothing here touches weights, caches or a device, so an actor that is prepared can take
the place of any worker. One that stands by imports before it is needed, and steps back: it gets
about a quarter of a core that others want, which a thread cannot be freed from again without
rights. Called by those who start engines; `actors.engine_preload` is its part of the fork server.
"""

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from threading import Lock

import psutil

ROOM_BYTES = 4 * 2**30  # of free memory
PATIENT = 5  # steps of niceness, each about a fifth less time than who wants the same core
NICENESS = "HONE_IMPORT_NICENESS"  # tells the fork server
_lock, _is_prepared = Lock(), False
OF_ACTOR = ("actors.vllm_engine", "learners.tokenizer")
OF_ENGINE = ("ray", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "actors.weight_transfer")


class EngineProcess(ForkServerProcess):
    """A copy of the fork server, with the environment that the starting process has by then: vLLM
    passes settings on that way.
    """

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.update(self._environment)
        super().run()


class EngineContext(ForkServerContext):
    Process = EngineProcess


def has_room() -> bool:
    """Whether this node, or this container, has memory to spare: a stand-by crowds nobody out."""
    from ray._private.utils import estimate_available_memory

    return min(psutil.virtual_memory().available, estimate_available_memory()) > ROOM_BYTES


def prepare(niceness: int = 0) -> None:
    """Import both halves side by side, and let engines of this process come from the fork server,
    which has no threads that a fork could break. Returns when it has forked for the first time, or
    at once when it has before.
    """
    global _is_prepared
    with _lock:
        if not _is_prepared:
            _prepare(niceness)
        _is_prepared = True


def _prepare(niceness: int) -> None:
    os.environ[NICENESS] = str(niceness)
    forkserver.set_forkserver_preload(["actors.engine_preload"])
    forkserver.ensure_running()
    import_all(OF_ACTOR, niceness)
    from actors.vllm_engine import start_processes_in

    start_processes_in(EngineContext)
    first = EngineContext().Process(target=_prove_imports)
    first.start()
    first.join()
    if first.exitcode != 0:
        raise RuntimeError(f"the first process of the fork server ended with {first.exitcode}")


def _prove_imports() -> None:
    """A fork server says nothing of a preload that failed."""
    os._exit(int(any(name not in sys.modules for name in OF_ENGINE)))


def import_all(names: Sequence[str], niceness: int) -> None:
    """Import modules, `niceness` steps below the calling thread, which stays as it is. Taking turns
    only when a core is idle (SCHED_IDLE) would not do: on two busy cores it took minutes, in which
    a lost worker had to start from nothing. Nothing of a module is garbage: nobody looks for it
    meanwhile, a sixth of the time, nor ever again, which would copy what forks share.
    """

    def work() -> None:
        os.nice(niceness)  # of this thread
        for name in names:
            importlib.import_module(name)

    gc.disable()
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="imports") as thread:
            thread.submit(work).result()
    finally:
        gc.enable()
        gc.freeze()
