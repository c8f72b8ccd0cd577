"""Backups of a real guest that are killed at random moments, one after the other, with nothing set right in between but
what the next backup itself does: the guest runs on, by QEMU's own events, and in the end nothing is left.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Counted
from tests.lab import LabMachine
from tests.test_live_backup_qemu import (
    block_graph,
    controller,
    files_beside,
    machine,
    migration_settings,
    place,
    repository,
)
from tests.workers import SLOW_MACHINE_SECONDS
from vmsnap.controller import Controller
from vmsnap.repository import Repository

__all__ = ["controller", "machine", "place", "repository"]
pytestmark = pytest.mark.qemu

SOAK_SECONDS = float(os.environ.get("VMSNAP_SOAK_SECONDS", "25"))
ALLOWED_SECONDS = 30
"""For a pause of those that are not killed: a busy machine takes seconds."""
LEAST_KILLS = 3
"""A busy machine may not come to so many within that time."""
SEED = int(os.environ.get("VMSNAP_SOAK_SEED", "1"))


def pauses(events: list[dict[str, object]]) -> list[float]:
    """How long each STOP lasted until the next RESUME, in seconds."""
    found, stopped = [], None
    for event in events:
        stamp = event["timestamp"]
        assert isinstance(stamp, dict)
        seconds = stamp["seconds"] + stamp["microseconds"] / 1e6
        if event["event"] == "STOP" and stopped is None:
            stopped = seconds
        elif event["event"] == "RESUME" and stopped is not None:
            found.append(seconds - stopped)
            stopped = None
    assert stopped is None, "it stands still"
    return found


@pytest.mark.timeout(SOAK_SECONDS + 600)
def test_killed_at_random_moments_the_guest_runs_and_nothing_is_left(
    machine: LabMachine, controller: Controller, repository: Repository, place: Path, counted: Counted
) -> None:
    controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
    graph, files, settings = block_graph(machine), files_beside(machine), migration_settings(machine)
    argv = [str(Path(sys.executable).parent / "vmsnap"), "--state-dir", str(controller.folders.state_dir)]
    argv += ["-r", str(place / "repository"), "--json", "backup", "vm001", "--max-pause", str(ALLOWED_SECONDS)]

    def worker() -> subprocess.Popen[str]:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    mark, begun = len(machine.oracle.events()), time.monotonic()
    first = worker()
    assert first.communicate()[1] == ""
    usual_seconds = time.monotonic() - begun
    chance = random.Random(SEED)
    killed = made = 0
    while time.monotonic() < begun + SOAK_SECONDS or killed < LEAST_KILLS:
        one = worker()
        try:
            _, said = one.communicate(timeout=chance.uniform(0, 1.2 * usual_seconds))
        except subprocess.TimeoutExpired:
            one.kill()
            one.communicate()
            killed += 1
        else:
            assert one.returncode == 0, said
            made += 1
        machine.wait_for_count(machine.latest_count() + 5, timeout_seconds=ALLOWED_SECONDS + SLOW_MACHINE_SECONDS)
    assert controller.recover().kept == ()
    # One that is killed between its commit and the keeping of its dirty bitmaps costs the next a whole reading.
    warnings = controller.backup("vm001", repository).warnings
    assert [said for said in warnings if "was read whole" not in said] == []
    assert controller.backup("vm001", repository).warnings == ()
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []
    assert (block_graph(machine), files_beside(machine), migration_settings(machine)) == (graph, files, settings)
    assert list(controller.folders.memory_dir.rglob("*")) == []
    manifests = repository.list()
    assert len(manifests) >= made + 3
    for manifest in manifests:
        assert not repository.verify(manifest.backup).findings
    longest = max(pauses(machine.oracle.events()[mark:]))
    assert longest < ALLOWED_SECONDS + SLOW_MACHINE_SECONDS
    counted(
        f"seed {SEED}: {killed} backups killed, {made} went through, longest pause {longest * 1000:.0f} ms "
        f"(at most {ALLOWED_SECONDS} s are allowed)",
        cases=killed,
        pause_seconds=longest,
    )
