"""What a fork server imports before it is asked for an engine; see `actors.engine_imports`.
Importing this module is all that it does. It ends with its actor, even in the middle of that.
"""

import ctypes
import os
import signal

from setproctitle import setproctitle

from actors.engine_imports import NICENESS, OF_ENGINE, import_all

PR_SET_PDEATHSIG = 1  # which the engines that are forked do not inherit

# Says so to who lists processes; engines give themselves other titles, for which its library has to
# be there before the environment moves.
setproctitle("hone::forkserver")
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
import_all(OF_ENGINE, int(os.environ[NICENESS]))
