"""A storage appliance that is this host: a real tgtd over files on a real XFS, and a real SSH server, each behind a
proxy that cuts; and a guest whose disk is a LUN of it. Test modules take the fixtures ``bench`` and ``commands`` over.
"""

from __future__ import annotations

import contextlib
import enum
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guardians import remove_host
from tests.lab import Disk, LabMachine, find_qemu
from tests.lab.sshd import SshServer
from tests.lab.tgtd import TargetServer, programs
from tests.proxy import Proxy, Trouble
from tests.qemu_stage import MIB, end_all, until
from tests.world import FaultyDrivers
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import VmsnapError
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.testing.faults import FaultPlan
from vmsnap_drivers import runner_ssh
from vmsnap_drivers.runner_ssh import SshRunner

TARGET = "iqn.2009-12.com.example:001"
SIZE_MIB, MEMORY_MIB = 66, 128
"""As small as the guest takes them: each case is a backup."""


class When(enum.Enum):
    """Where in a command the connection is lost."""

    BEFORE = "before it"
    DONE = "after it was done, before its answer"


class Appliance:
    """A tgtd with one LUN, and an SSH server whose commands can be held when they are done; each behind a proxy."""

    def __init__(self, place: Path, images: Path, server: TargetServer, sshd: SshServer) -> None:
        self.images = images
        self.server = server
        self.hold, self.done = place / "hold", place / "done"
        self._denied = place / "denied"
        self.ssh = Proxy(("127.0.0.1", sshd.port))
        self.iscsi = Proxy(("127.0.0.1", server.port))
        known = sshd.known_hosts.read_text().split(" ", 1)[1]
        (place / "known").write_text(f"[127.0.0.1]:{self.ssh.port} {known}")
        self.address = f"iscsi://127.0.0.1:{self.iscsi.port}/{TARGET}/1"
        self.options = {
            "appliances": f"127.0.0.1:{self.iscsi.port}=ssh://root@127.0.0.1:{self.ssh.port}",
            "known_hosts": str(place / "known"),
            "ssh_key": str(sshd.key),
            "server": "tgt",
        }

    def left(self) -> list[str]:
        """What there is beside the one LUN."""
        return sorted({*(path.name for path in self.images.iterdir()), *self.server.targets()} - {"disk0.img", TARGET})

    def vanish(self) -> None:
        """No command reaches it from now on."""
        self.ssh.refusing = True
        self.ssh.cut_all()

    def come_back(self) -> None:
        """Commands reach it again."""
        self.ssh.clear()

    @contextlib.contextmanager
    def without_rights(self) -> Iterator[None]:
        """Commands for tgtd are given by somebody who may not use its socket."""
        self._denied.touch()
        try:
            yield
        finally:
            self._denied.unlink()

    def close(self) -> None:
        """End the proxies."""
        self.ssh.close()
        self.iscsi.close()


class Commands:
    """Counts the commands that are given over SSH; at one of them the appliance vanishes, or goes silent."""

    def __init__(self, appliance: Appliance, begin: Callable[..., Any]) -> None:
        self._appliance = appliance
        self._begin = begin
        self.given: list[str] = []
        self.arm()

    def arm(
        self, at: int | str | None = None, when: When = When.BEFORE, *, earlier: int = 0, silently: bool = False
    ) -> None:
        """Count anew.

        :param at: the number of the command, or its program; None: nothing happens
        :param earlier: how many commands of that program come before it
        """
        self.given.clear()
        self.at, self.when, self.earlier, self.silently = at, when, earlier, silently
        self.struck = False

    def begin(self, runner: SshRunner, argv: Any) -> Any:
        """In place of `SshRunner._begin`."""
        number = len(self.given)
        self.given.append(f"{argv[0]} {argv[argv.index('--op') + 1]}" if "--op" in argv else argv[0])
        is_program = self.at == self.given[-1] and self.given.count(self.given[-1]) == self.earlier + 1
        if self.struck or not (self.at == number or is_program):
            return self._begin(runner, argv)
        self.struck = True
        appliance = self._appliance
        if self.when is When.BEFORE:
            appliance.vanish()
            return self._begin(runner, argv)
        appliance.hold.touch()
        channel = self._begin(runner, argv)
        until(appliance.done.exists, f"command {number} is done", 60)
        if self.silently:
            appliance.ssh.add(Trouble("stall", direction="down", times=1000))
        else:
            appliance.vanish()
        appliance.done.unlink()
        appliance.hold.unlink()
        return channel


class Bench:
    """The VM on the appliance's LUN, and vmsnap's state."""

    def __init__(self, place: Path, appliance: Appliance) -> None:
        self.appliance = appliance
        self.folders = HostFolders.find(place / "state")
        self.repository = create_repository(str(place / "repository"))
        self.machine = LabMachine(
            place / "vm001",
            find_qemu("7.2"),
            memory_mib=MEMORY_MIB,
            disks=(Disk("raw", SIZE_MIB * MIB, appliance.address),),
            settings={"slots": 64, "pause_us": 20000},
        )

    @contextlib.contextmanager
    def controller(self, plan: FaultPlan | None = None, **options: str) -> Iterator[Controller]:
        context, given = self.folders.context(), {**self.appliance.options, "pause_seconds": "30", **options}
        drivers = FaultyDrivers(context, plan, {"iscsi": given}) if plan else Drivers(context, {"iscsi": given})
        with Controller(self.folders, drivers=drivers) as made:
            yield made

    def backup(self, controller: Controller, **how: Any) -> str:
        """A backup, and the end of the duplicate that it kept; returns what failed, empty where nothing did. `how`:
        further arguments of `Controller.backup`.
        """
        before, held = len(self.repository.list()), ""
        try:
            result = controller.backup("vm001", self.repository, max_pause_seconds=60, **how)
            held = result.duplicate
            if held:
                controller.discard_duplicate(held)
        except VmsnapError as e:
            assert "\n" not in str(e)
            # Of one that failed nothing is listed, but where its store was done: then its error says so.
            stored = bool(held) or any("is stored all the same" in note for note in getattr(e, "__notes__", ()))
            assert len(self.repository.list()) == before + stored
            return str(e)
        assert len(self.repository.list()) == before + 1
        assert all("\n" not in line for line in result.warnings)
        return "; ".join(result.warnings)

    def see_that_the_guest_runs(self) -> None:
        self.machine.wait_for_count(self.machine.latest_count() + 3)
        assert self.machine.faults() == [] and self.machine.oracle.status() == "running"

    def see_that_nothing_is_left(self, controller: Controller) -> None:
        assert controller.recover().kept == ()
        assert self.appliance.left() == [] and controller.journal.unfinished() == [] and controller.duplicates() == []
        assert [row.vm for row in controller.table.rows()] == ["vm001"]


@pytest.fixture(scope="module")
def bench(xfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    place, images = Path(tempfile.mkdtemp(prefix="vmsnap-")), xfs / "luns"
    images.mkdir()
    with (images / "disk0.img").open("wb") as file:
        file.truncate(SIZE_MIB * MIB)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, images)
        stack.callback(remove_host, place)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        server = stack.enter_context(TargetServer(tmp_path_factory.mktemp("tgtd")))
        server.add(TARGET, images / "disk0.img")
        # An appliance's tgtd has the control port 0; this one must not be in the way of another. And sshd has a /run of
        # its own, where its socket is not.
        tgtadm = place / "bin/tgtadm"
        tgtadm.parent.mkdir()
        tgtadm.write_text(
            f"#!/bin/sh\nwho=\n[ -e {place}/denied ] && who='setpriv --reuid 65534 --regid 65534 --clear-groups'\n"
            f'exec nsenter --target {server.pid} --mount $who {programs()}/tgtadm "$@"'
            f" --control-port {server.control_port}\n"
        )
        # What is held is done, and its status is not told.
        given = place / "bin/given"
        given.write_text(
            f'#!/bin/sh\nsh -c "$SSH_ORIGINAL_COMMAND"\nstatus=$?\nif [ -e {place}/hold ]; then\n: > {place}/done\n'
            f"while [ -e {place}/hold ]; do sleep 0.01; done\nfi\nexit $status\n"
        )
        # Who looks for the appliance's tgtd in the table of sockets finds this one.
        dd = place / "bin/dd"
        dd.write_text(
            f'#!/bin/sh\n[ "$1" = if=/proc/net/unix ] || exec /usr/bin/dd "$@"\n'
            f'/usr/bin/dd "$@" | sed "s/socket.{server.control_port}$/socket.0/"\n'
        )
        for program in (tgtadm, given, dd):
            program.chmod(0o755)
        patch.setattr(runner_ssh, "_PATH", f"{tgtadm.parent}:{runner_ssh._PATH}")
        sshd = stack.enter_context(SshServer(tmp_path_factory.mktemp("sshd"), (f"ForceCommand {given}",)))
        appliance = Appliance(place, images, server, sshd)
        stack.callback(appliance.close)
        made = Bench(place, appliance)
        stack.enter_context(made.machine)
        stack.callback(end_all, place)
        made.machine.wait_for_check(1, timeout_seconds=200)
        with made.controller() as controller:
            controller.add_vm("vm001", "qemu", {"qmp": str(made.machine.qmp_socket), "capture": "cow"})
        yield made


@pytest.fixture
def commands(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(bench.appliance, SshRunner._begin)
    monkeypatch.setattr(SshRunner, "_begin", lambda runner, argv: made.begin(runner, argv))
    return made
