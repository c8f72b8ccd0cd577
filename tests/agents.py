"""A state folder with simulated VMs, a repository, and an agent as a real process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.test_cli import BIN, Scripts
from vmsnap.agent.client import AgentClient
from vmsnap.agent.house import Blueprint, House
from vmsnap.agent.jobs import Job
from vmsnap.agent.settings import AgentSettings
from vmsnap.errors import VmsnapError

T = TypeVar("T")
PATIENCE_SECONDS = 90.0
"""For a slow and busy machine; nothing takes so long on an idle one."""


def eventually(look: Callable[[], T], what: str = "it", seconds: float = PATIENCE_SECONDS) -> T:
    """What `look` finds, as soon as that is something."""
    ends = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < ends, f"{what} did not come within {seconds:.0f} s"
        time.sleep(0.05)
    return found


class AgentHouse(Scripts):
    """`vm001` … executing, an empty repository, and as many lives of an agent as wanted, one after the other."""

    def __init__(self, folder: Path, *, vms: int = 1, configuration: str = "") -> None:
        super().__init__(folder)
        self.state.mkdir(mode=0o700)
        self.repository = str(folder / "repository")
        self.configuration = folder / "config.toml"
        self.configuration.write_text(f'repository = "{self.repository}"\n{configuration}')
        self.environment["VMSNAP_CONFIG"] = str(self.configuration)
        self.environment["VMSNAP_CACHE_DIR"] = str(folder / "cache")
        self.socket = self.state / "agent" / "agent.sock"
        self.log = folder / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.json("init", "--encryption", "none")
        for number in range(1, vms + 1):
            self.json("start", f"vm{number:03}", "--memory", "4M", "--disk", "4M", script="vmsnap-sim")

    def start_agent(self, **environment: str) -> AgentClient:
        """Start an agent; it answers when this returns."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "vmsnap"), "agent"],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        client = AgentClient(f"unix:{self.socket}")
        eventually(lambda: self._answers(client), "the agent")
        return client

    @property
    def https(self) -> str:
        """Where it serves over TLS, as it said."""
        lines = [line for line in self.log.read_text().splitlines() if "serving on https://" in line]
        return lines[-1].rpartition(" ")[2]

    def _answers(self, client: AgentClient) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(VmsnapError):  # it does not listen yet
            return bool(client.get("/health")["status"] == "ok")
        return False

    def stop_agent(self, number: int = signal.SIGTERM) -> int:
        """Send the agent a signal, and wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_SECONDS)
        self.process = None
        return code

    def house(self, **settings: Any) -> House:
        """The database as the agent has it, of this process."""
        return House(Blueprint(self.state, AgentSettings(**settings), repository=self.repository))

    @contextlib.contextmanager
    def looking(self) -> Iterator[House]:
        """The same for a look."""
        house = self.house()
        try:
            yield house
        finally:
            house.close()

    def jobs(self, *verbs: str) -> list[Job]:
        """The jobs of these verbs, or all, oldest first."""
        with self.looking() as house:
            return [job for job in reversed(house.jobs.page(limit=500)) if not verbs or job.verb in verbs]

    def ended(self, job: int) -> Job:
        """The job when it has ended."""

        def look() -> Job | None:
            with self.looking() as house:
                found = house.jobs.get(job)
            return found if found.ended else None

        return eventually(look, f"the end of job {job}")

    def quiet(self) -> list[Job]:
        """All jobs, once none is open and all that follows is entered."""

        def look() -> list[Job] | None:
            with self.looking() as house:
                return (
                    None if house.jobs.open() or house.jobs.unsettled() else list(reversed(house.jobs.page(limit=500)))
                )

        return eventually(look, "the end of all jobs")

    def executes(self, vm: str = "vm001") -> bool:
        """Whether its hypervisor says so."""
        return bool(self.json("vm", "show", vm)["state"] == "executing")

    def close(self) -> None:
        """End all of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_SECONDS)
        for job in self.jobs() if self.state.exists() else []:
            if job.pid and not job.ended and job.process_alive():
                os.kill(job.pid, signal.SIGKILL)
        super().close()
