"""What is recorded: a state folder and a repository are made, a VM is backed up, backups go, the passphrase changes.

    python -m tests.storedfiles.workload FOLDER OPTIONS

`OPTIONS` are those of the simulated VM, as JSON. What is promised from then on is written to ``promises`` in the
folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.repository import Repository
from vmsnap.repository.keys import KeyCost
from vmsnap_storage_backends.local import LocalStorage

PROMISES = "promises"
CHEAP = KeyCost(time_cost=1, memory_kib=64, lanes=1)


def main() -> None:
    """Do all of it."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    descriptor = os.open(folder / PROMISES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def promise(*words: str) -> None:
        os.write(descriptor, f"{' '.join(words)}\n".encode())

    repository = Repository.create(LocalStorage(str(folder / "repository")), "first", key_cost=CHEAP)
    promise("passphrase", "first")
    with Controller(HostFolders.find(folder / "state")) as controller:
        controller.add_vm("vm001", "simulated", options)
        promise("vm")
        for number in range(4):
            backup = controller.backup("vm001", repository, tags=(f"number{number}",)).backup
            promise("backup", backup)
            if number == 2:
                oldest = repository.list()[0].backup
                # From the next instant on it may be gone.
                promise("gone", oldest)
                repository.forget(oldest)
                repository.gc()
                repository.gc(dead_after_seconds=0)
                promise("changing", "second")
                repository.change_passphrase("second", cost=CHEAP)
                promise("passphrase", "second")
    os.close(descriptor)


if __name__ == "__main__":
    main()
