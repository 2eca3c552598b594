"""What the fork server of a stand-by imports before it is asked for an engine; see
`actors.standby`. Importing this module is all that it does. A fork server ends with its actor, even
in the middle of that.
"""

import ctypes
import signal

from actors.standby import OF_ENGINE, import_patiently

PR_SET_PDEATHSIG = 1  # which the engines that are forked do not inherit

ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
import_patiently(OF_ENGINE)
