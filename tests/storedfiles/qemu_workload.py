"""What is recorded beside a real QEMU: its VM is registered and backed up live, by pre-copy and by copy on write.

    python -m tests.storedfiles.qemu_workload FOLDER QMP

What is promised from then on is written to ``promises`` in the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.storedfiles.workload import CHEAP, PROMISES
from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.repository import Repository
from vmsnap_storage_backends.local import LocalStorage

CAPTURES = ("precopy", "precopy", "cow")


def main() -> None:
    """Do all of it."""
    folder, qmp = Path(sys.argv[1]), sys.argv[2]
    descriptor = os.open(folder / PROMISES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def promise(*words: str) -> None:
        os.write(descriptor, f"{' '.join(words)}\n".encode())

    repository = Repository.create(LocalStorage(str(folder / "repository")), "first", key_cost=CHEAP)
    promise("passphrase", "first")
    with Controller(HostFolders.find(folder / "state")) as controller:
        before = ""
        for capture in CAPTURES:
            if capture != before:
                if before:
                    controller.remove_vm("vm001")
                controller.add_vm("vm001", "qemu", {"qmp": qmp, "capture": capture})
                before = capture
            promise("begins", capture)
            promise("backup", controller.backup("vm001", repository, max_pause_seconds=20).backup)
    os.close(descriptor)


if __name__ == "__main__":
    main()
