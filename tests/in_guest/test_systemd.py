"""vmsnap under a real systemd: it kills a worker in the pause with all that is in its unit, and the guest runs; the
agent's units start by their socket, are watched, and stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tests.in_guest.volumes import run
from tests.workers import WORKER
from tests.world import World
from vmsnap.agent.client import AgentClient
from vmsnap.errors import VmsnapError
from vmsnap.testing.rigs import eventually

pytestmark = [pytest.mark.lab, pytest.mark.systemd]

SLOW_MACHINE_SECONDS = 120.0
MAX_PAUSE_SECONDS = 600
"""So long that it is not the deadline that makes the guardian act."""
UNITS = Path("/etc/systemd/system")
WORKER_UNIT = """\
[Service]
Environment=PYTHONPATH={path}
ExecStart=/bin/sh -c 'exec {python} {folder}/worker.py {state} {url} duplicate {max_pause} backup 1 0<>{folder}/fifo'
StandardOutput=file:{folder}/told
StandardError=file:{folder}/errors
TimeoutStopSec=2
{hardening}
"""
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(guarded=True)
    yield made
    made.close()


def shown(unit: str, name: str) -> str:
    """What systemd says of a property of a unit."""
    return run("systemctl", "show", "--value", f"--property={name}", unit).strip()


def hardening() -> str:
    """What the agent's unit takes away from its processes, and so from the workers and guardians among them."""
    unit = files("vmsnap.agent").joinpath("units", "vmsnap-agent.service").read_text()
    lines = unit.partition("NoNewPrivileges=")
    return f"{lines[1]}{lines[2].partition('[Install]')[0]}"


@pytest.fixture
def paused(world: World, tmp_path: Path) -> Iterator[str]:
    """A unit, hardened like the agent's, whose worker stands in the pause and does not listen to SIGTERM."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "worker.py").write_text(IGNORES_SIGTERM + WORKER)
    (UNITS / "worker.service").write_text(
        WORKER_UNIT.format(
            path=":".join(filter(None, sys.path)), python=sys.executable, folder=tmp_path, url=world.url,
            state=world.folders.state_dir, max_pause=MAX_PAUSE_SECONDS, hardening=hardening(),
        )
    )  # fmt: skip
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "worker.service")
    told, errors = tmp_path / "told", tmp_path / "errors"

    def stands() -> bool:
        if (state := shown("worker.service", "ActiveState")) != "active":
            raise AssertionError(f"the worker is {state}: {told.read_text()}{errors.read_text()}")
        return "HERE" in told.read_text()

    eventually(stands, "the worker stands in the pause", SLOW_MACHINE_SECONDS)
    assert world.status()["state"] == "stopped"
    yield "worker.service"
    subprocess.run(["systemctl", "kill", "--signal=KILL", "worker.service"], check=False, capture_output=True)
    (UNITS / "worker.service").unlink()


@pytest.mark.parametrize(
    "end", [("kill", "--signal=KILL"), ("stop",)], ids=["systemctl kill", "systemctl stop, and SIGKILL after it"]
)
def test_a_worker_whose_unit_is_killed_in_the_pause_leaves_a_running_vm(
    world: World, paused: str, end: tuple[str, ...]
) -> None:
    run("systemctl", *end, paused)
    eventually(lambda: world.status()["state"] == "executing", "the guest runs", SLOW_MACHINE_SECONDS)
    eventually(lambda: shown(paused, "ActiveState") == "failed", "the unit has ended", SLOW_MACHINE_SECONDS)
    assert shown(paused, "Result") == ("signal" if end[0] == "kill" else "timeout")
    with world.controller() as controller:
        eventually(lambda: not controller.journal.unfinished(), "the guardian sets it right", SLOW_MACHINE_SECONDS)
        assert controller.recover().kept == ()
    world.see_that_all_is_well(backups=0)


def test_the_agents_units_start_by_the_socket_are_watched_and_stop(tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "vmsnap")
    run(program, "agent", "units", "--output", str(UNITS))
    (UNITS / "vmsnap-agent.service.d").mkdir()
    (UNITS / "vmsnap-agent.service.d" / "lab.conf").write_text("[Service]\nWatchdogSec=12\nRestartSec=0\n")
    service, agent = "vmsnap-agent.service", AgentClient("unix:/run/vmsnap/agent.sock")
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "vmsnap-agent.socket")
    assert shown(service, "ActiveState") == "inactive"

    def answers() -> bool:
        try:
            return bool(agent.get("/health")["status"] == "ok")
        except VmsnapError:  # it does not answer yet, or no more
            return False

    # Whoever opens the socket starts the service, and is heard when it is there.
    eventually(answers, "the agent answers", SLOW_MACHINE_SECONDS)
    # Type=notify: systemd calls it active when it has said so itself.
    eventually(lambda: shown(service, "ActiveState") == "active", "it is ready", SLOW_MACHINE_SECONDS)
    first = int(shown(service, "MainPID"))
    os.kill(first, signal.SIGSTOP)
    eventually(lambda: int(shown(service, "NRestarts")) >= 1, "the watchdog starts it again", SLOW_MACHINE_SECONDS)
    eventually(answers, "it answers again", SLOW_MACHINE_SECONDS)
    assert int(shown(service, "MainPID")) != first
    run("systemctl", "stop", "vmsnap-agent.socket", service)
    assert [shown(service, name) for name in ("ActiveState", "Result", "ExecMainStatus")] == [
        "inactive",
        "success",
        "0",
    ]
