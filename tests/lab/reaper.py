"""Runs a daemon and takes in all orphans below it, as init would: libvirtd waits for the ends of QEMUs that it has
daemonized, and the process 1 of a container may be long in burying them.

    python reaper.py PROGRAM ARGUMENT…

Says the daemon's process id, and ends when the last process below it has ended.
"""

import ctypes
import os
import signal
import sys

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def main() -> None:
    """See the module."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
    sys.stdout.write(f"{pid}\n")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
