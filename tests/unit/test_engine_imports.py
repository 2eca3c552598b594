"""What a stand-by imports ahead of need disturbs nobody, and engines that are copies of a fork
server get the settings of the process that starts them.
"""

import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from actors.engine_imports import PATIENT, EngineContext, import_all

VARIABLE = "HONE_TEST_EXIT_CODE"


def test_only_the_imports_step_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "import os\nNICENESS = os.getpriority(os.PRIO_PROCESS, 0)\n"  # of the calling thread
    (tmp_path / "imported_patiently.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    import_all(["imported_patiently"], PATIENT)
    imported = sys.modules.pop("imported_patiently")
    assert before + PATIENT == imported.NICENESS
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_an_import_that_fails_is_not_kept_quiet() -> None:
    with pytest.raises(ModuleNotFoundError, match="there_is_none"):
        import_all(["there_is_none"], 0)


def test_an_engine_has_the_environment_of_the_process_that_starts_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forkserver.set_forkserver_preload([])
    forkserver.ensure_running()
    monkeypatch.setenv(VARIABLE, "7")  # the fork server does not have it
    program = f"import os, sys; sys.exit(int(os.environ[{VARIABLE!r}]))"
    process = EngineContext().Process(target=exec, args=(program,))
    process.start()
    process.join(60)
    assert process.exitcode == 7
