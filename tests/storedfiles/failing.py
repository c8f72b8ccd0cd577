"""A process in which one call on a file fails, and which backs up a VM all the same: a new child for each case.

    python -m tests.storedfiles.failing STATE_DIR REPOSITORY

Each line of its input is a case, ``NUMBER CHOICE LASTING``, see ``arm`` in between.c; the answer is a line of JSON, and
another one, ``ended``, when the child is gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path

from tests.world import unguarded
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import VmsnapError
from vmsnap.host import HostFolders
from vmsnap.places import open_repository


def main() -> None:
    """Do what the input says."""
    library = ctypes.CDLL(None)
    library.left.restype = ctypes.c_long
    library.arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
    state_dir, url = Path(sys.argv[1]), sys.argv[2]
    for line in sys.stdin:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            # A child that has answered lives still, for a moment.
            sys.stdout.write("ended\n")
            sys.stdout.flush()
            continue
        library.arm(*map(int, line.split()))
        answer = back_up(state_dir, url) | {"left": library.left()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        os._exit(0)


def back_up(state_dir: Path, url: str) -> dict[str, object]:
    """The backup's id, or the error in one line; a traceback where it was none of vmsnap's own."""
    try:
        folders = HostFolders.find(state_dir)
        with Controller(folders, drivers=Drivers(folders.context()), start_guardian=unguarded) as controller:
            return {"backup": controller.backup("vm001", open_repository(url)).backup}
    except VmsnapError as e:
        return {"error": e.message}
    except BaseException:  # noqa: BLE001 - it is handed to the test, which fails by it
        return {"traceback": traceback.format_exc()}


if __name__ == "__main__":
    main()
