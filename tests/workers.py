"""Processes that carry out a verb and stop at a call of a driver, to be killed or let go on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vmsnap.controller import Controller
from vmsnap.model import VmState

WORKER = """
import os, sys
from pathlib import Path
from vmsnap.cli.session import quit_at_once
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import Interrupted, VmsnapError
from vmsnap.host import HostFolders
from vmsnap.places import open_repository
from vmsnap.testing.faults import FaultPlan
from tests.world import FaultyDrivers

class Announced(FaultPlan):
    waits = sys.argv[3].split(",")
    left = int(sys.argv[6])

    def count(self, method):
        print(method, flush=True)
        if self.waits and method == self.waits[0]:
            self.left -= 1
            if not self.left:
                self.waits, self.left = self.waits[1:], 1
                print("HERE", flush=True)
                sys.stdin.read(1)
        return super().count(method)

folders = HostFolders.find(Path(sys.argv[1]))
controller = Controller(folders, drivers=FaultyDrivers(folders.context(), Announced()))
controller.interruption.second = quit_at_once
try:
    verb, _, stored = sys.argv[5].partition(":")
    uri = controller.vm("vm001").options.get("uri")
    options = {"uri": uri} if uri else None
    if verb == "failover":
        controller.failover("vm001")
    elif verb == "restore":
        controller.restore(open_repository(sys.argv[2]), stored, "vm002", run=True, isolated=True, options=options)
    elif verb == "consolidate":
        target = folders.state_dir / "clean"
        controller.consolidate(open_repository(sys.argv[2]), stored, target, options=options)
    elif verb == "verify":
        controller.verify_boot(open_repository(sys.argv[2]), stored, life_seconds=120, options=options)
    else:
        mode = {"backup": "live", "frozen": "live"}.get(verb, verb)
        how = {"mode": mode, "freeze": "overlay" if verb == "frozen" else "none"}
        controller.backup("vm001", open_repository(sys.argv[2]), max_pause_seconds=float(sys.argv[4]), **how)
except (VmsnapError, Interrupted) as error:
    print("ERROR", error, flush=True)
    sys.exit(error.exit_code)
"""

MAX_PAUSE_SECONDS = 2
"""What a worker allows that hangs: its guardian acts so soon."""

PATIENT_SECONDS = 60
"""What others allow: on a busy machine a pause may take seconds, and no guardian is to come before the test."""

SLOW_MACHINE_SECONDS = 30
"""What killing a worker and resuming may take on top, where other programs have the processors."""


def worker_that_waits_at(
    state_dir: Path,
    url: str,
    call: str,
    *,
    verb: str = "backup",
    number: int = 1,
    max_pause_seconds: float = PATIENT_SECONDS,
) -> subprocess.Popen[str]:
    """A worker that backs up ``vm001`` into the repository at `url` (or, by `verb`, in mode ``consistent``, or with its
    disks ``frozen``, or lets its duplicate take over: ``failover``, or does with a backup ``restore:ID``, as ``vm002``,
    ``consolidate:ID``, into ``clean`` in the state folder, or ``verify:ID``), has come to its call number `number` of
    the driver method `call`, and waits there for a byte on its standard input. Of several, with commas, it waits at the
    next ones too, one after the other, and says ``HERE`` each time.
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(state_dir), url, call, str(max_pause_seconds), verb, str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    told = []
    for line in worker.stdout or ():
        if line.strip() == "HERE":
            return worker
        told.append(line)
    raise AssertionError(f"the worker never came to {call}: {worker.wait()}, {''.join(told)}")


def kill_failovers_at(controller: Controller, duplicate: str | None, calls: Sequence[str]) -> None:
    """Kill a failover of ``vm001`` at each of these calls of a driver, the last of them ``resume``, and see after each
    that recovery keeps nothing back, and that the duplicate is there still, until it is the VM.
    """
    for call in calls:
        assert [each.duplicate for each in controller.duplicates()] == [duplicate], call
        worker = worker_that_waits_at(controller.folders.state_dir, "", call, verb="failover")
        worker.kill()
        worker.communicate()
        recovered = controller.recover()
        assert recovered.kept == (), (call, recovered)
        assert controller.journal.unfinished() == []
        # Until it is told to run nothing of it has changed; from then on it is the VM.
        assert (controller.vm("vm001").state == VmState.EXECUTING.value) == (call == "resume"), call
    assert controller.duplicates() == []
