"""What is slow about starting an engine, done before it is needed.

Nearly all of the seconds until a new rollout worker serves are imports: once in the actor, and once
more in the process that vLLM starts for the engine. A stand-by has both behind it: the modules of
the actor, and a fork server with those of the engine, of which that process is then a copy.

Invariant: nothing here touches weights, caches or a device, so a stand-by can take the place of any
worker on CPU; and its imports, which are much work, step back: they get about a quarter of a core
that others want, which a thread cannot be freed from again without rights, so only one that is
prepared is handed out. Called by `actors.rollout_worker`; `actors.engine_preload` is its part of
the fork server.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess

import psutil

ROOM_BYTES = 4 * 2**30  # of free memory
PATIENCE = 5  # steps of niceness, each about a fifth less time than who wants the same core
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


def prepare() -> None:
    """Import both halves side by side, and let engines of this process come from the fork server,
    which has no threads that a fork could break. Returns when it has forked for the first time.
    """
    forkserver.set_forkserver_preload(["actors.engine_preload"])
    forkserver.ensure_running()
    import_patiently(OF_ACTOR)
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


def import_patiently(names: Sequence[str]) -> None:
    """Import modules at a lower priority than the run's; the calling thread stays as it is. Taking
    turns only when a core is idle (SCHED_IDLE) would not do: on two busy cores it took minutes, in
    which a lost worker had to start from nothing.
    """

    def work() -> None:
        os.nice(PATIENCE)  # of this thread
        for name in names:
            importlib.import_module(name)

    with ThreadPoolExecutor(1, thread_name_prefix="imports") as thread:
        thread.submit(work).result()
