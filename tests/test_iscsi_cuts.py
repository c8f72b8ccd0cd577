"""The network to a storage appliance is cut at each command that vmsnap gives it: before the command, and after it was
done but before its answer. And the connections to LUNs are cut, the guest's own and those by which a snapshot is read.
Each time the guest runs, what failed is one clear line, and nothing is left: at once, or, as long as the appliance
cannot be reached, in the journal, from which ``recover`` removes it when it is back.

The appliance is this host: a real tgtd over files on a real XFS, and a real SSH server, each behind a proxy that cuts.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

from tests.conftest import Counted
from tests.guardians import remove_host
from tests.lab import Disk, LabMachine, find_qemu
from tests.lab.qmp import seconds_between
from tests.lab.sshd import SshServer
from tests.lab.tgtd import TargetServer, programs
from tests.proxy import Proxy, Trouble
from tests.qemu_stage import MIB, end_all, until
from tests.test_file_mechanism import xfs
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import VmsnapError
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.faults import FaultPlan, FaultySnapshotMechanism
from vmsnap_drivers import runner_ssh
from vmsnap_drivers.runner_ssh import SshRunner
from vmsnap_drivers.snapshots.iscsi import initiator

__all__ = ["xfs"]
pytestmark = [pytest.mark.qemu, pytest.mark.lab, pytest.mark.sshd, pytest.mark.timeout(600)]

P = ParamSpec("P")
T = TypeVar("T")
TARGET = "iqn.2009-12.com.example:001"
SIZE_MIB, MEMORY_MIB = 66, 128
"""As small as the guest takes them: each case is a backup."""
ASKING = frozenset(["tgtadm show", "stat", "test", "sync"])
"""Commands that change nothing."""


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

    def arm(self, at: int | str | None = None, when: When = When.BEFORE, *, silently: bool = False) -> None:
        """Count anew.

        :param at: the number of the command, or the program whose first command it is; None: nothing happens
        """
        self.given.clear()
        self.at, self.when, self.silently = at, when, silently
        self.struck = False

    def begin(self, runner: SshRunner, argv: Any) -> Any:
        """In place of `SshRunner._begin`."""
        number = len(self.given)
        self.given.append(f"{argv[0]} {argv[argv.index('--op') + 1]}" if "--op" in argv else argv[0])
        if self.struck or self.at not in (number, self.given[-1]):
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


class Calls(FaultPlan):
    """Plans no faults; before the first call of each of these methods of the mechanism it does something."""

    def __init__(self, do: Callable[[], None], *before: str) -> None:
        super().__init__()
        self._do = do
        self.left = set(before)

    def call(
        self, default: type[VmsnapError], method: str, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if method in self.left:
            self.left.remove(method)
            self._do()
        return super().call(default, method, target, *args, **kwargs)


class WrappedDrivers(Drivers):
    """Drivers whose mechanism ``iscsi`` tells a plan of its calls."""

    def __init__(self, context: DriverContext, options: Mapping[str, str], plan: FaultPlan) -> None:
        super().__init__(context, {"iscsi": options})
        self._plan = plan

    def mechanism(self, name: str) -> SnapshotMechanism:
        made = super().mechanism(name)
        return FaultySnapshotMechanism(made, self._plan) if name == "iscsi" else made


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
        drivers = WrappedDrivers(context, given, plan) if plan else Drivers(context, {"iscsi": given})
        with Controller(self.folders, drivers=drivers) as made:
            yield made

    def backup(self, controller: Controller, *, keep: bool) -> str:
        """A backup, and the end of the duplicate that it kept; returns what failed, empty where nothing did."""
        before, held = len(self.repository.list()), ""
        try:
            result = controller.backup("vm001", self.repository, keep_duplicate=keep, max_pause_seconds=60)
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
            f'#!/bin/sh\nexec nsenter --target {server.pid} --mount {programs()}/tgtadm "$@"'
            f" --control-port {server.control_port}\n"
        )
        # What is held is done, and its status is not told.
        given = place / "bin/given"
        given.write_text(
            f'#!/bin/sh\nsh -c "$SSH_ORIGINAL_COMMAND"\nstatus=$?\nif [ -e {place}/hold ]; then\n: > {place}/done\n'
            f"while [ -e {place}/hold ]; do sleep 0.01; done\nfi\nexit $status\n"
        )
        for program in (tgtadm, given):
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


def test_the_appliance_vanishes_at_each_command_before_it_and_when_it_was_done(
    bench: Bench, commands: Commands, counted: Counted
) -> None:
    with bench.controller() as controller:
        assert bench.backup(controller, keep=True) == ""
        given = list(commands.given)
        bench.see_that_nothing_is_left(controller)
    cases, kept_ones, cut_recoveries = _cases(given), 0, 0
    exported = given.index("tgtadm bind")
    for number, when in cases:
        case = f"command {number} ({given[number]}), {when.value}"
        with bench.controller() as controller:
            commands.arm(number, when)
            problem = bench.backup(controller, keep=True)
            assert commands.struck and bench.appliance.ssh.refusing, case
            assert f"ssh://root@127.0.0.1:{bench.appliance.ssh.port}" in problem, f"{case}: {problem!r}"
            bench.see_that_the_guest_runs()
            kept = controller.recover().kept
            assert all("\n" not in line for line in kept), case
            left = bench.appliance.left()
            assert not left or (kept and controller.journal.unfinished()), f"{case}: {left}"
            kept_ones += bool(left)
            bench.appliance.come_back()
            if (number, when) == (exported, When.DONE):
                cut_recoveries += _cut_recovery(bench, controller, commands)
            commands.arm()
            bench.see_that_nothing_is_left(controller)
    counted(
        f"SSH cut {len(cases)} times at {len(given)} commands of a backup, and at {cut_recoveries} of its recovery;"
        f" {kept_ones} times something was kept in the journal until the appliance was back",
        cases=len(cases) + cut_recoveries,
    )
    assert cut_recoveries > 3 and kept_ones > len(cases) / 2


def _cut_recovery(bench: Bench, controller: Controller, commands: Commands) -> int:
    """Recover again and again, each time cut one place further, until it comes to its end; returns how often it was
    cut.
    """
    number, when = 0, When.BEFORE
    for cut in range(100):
        before = bench.appliance.left()
        commands.arm(number, when)
        kept = controller.recover().kept
        if not commands.struck:
            assert kept == ()
            return cut
        assert all("\n" not in line for line in kept)
        assert not bench.appliance.left() or (kept and controller.journal.unfinished())
        bench.appliance.come_back()
        if when is When.DONE:
            # What is gone is gone: the next recovery has less to do.
            number = number + 1 if bench.appliance.left() == before else 0
        when = When.DONE if when is When.BEFORE else When.BEFORE
    raise AssertionError("recovery never ends")


def test_an_appliance_that_goes_silent_in_the_pause_does_not_hold_the_guest(
    bench: Bench, commands: Commands, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    """Nothing is reset: packets are dropped, as a firewall or a dead switch does it."""
    monkeypatch.setattr(runner_ssh, "_CONNECT_SECONDS", 2.0)
    with bench.controller(pause_seconds="1") as controller:
        commands.arm("cp", When.DONE, silently=True)
        problem = bench.backup(controller, keep=False)
        assert commands.struck and "did not end within 1 s, and may go on" in problem
        events = [e for e in bench.machine.oracle.events() if e["event"] in ("STOP", "RESUME")]
        pause_seconds = max(seconds_between(*pair) for pair in pairwise(events) if pair[0]["event"] == "STOP")
        bench.see_that_the_guest_runs()
        assert controller.recover().kept and bench.appliance.left()
        commands.arm()
        bench.appliance.come_back()
        bench.see_that_nothing_is_left(controller)
    counted(f"the appliance silent in the pause: {pause_seconds:.1f} s", cases=1, pause_seconds=pause_seconds)
    assert 1 <= pause_seconds < 5


def test_the_connections_to_luns_are_cut_and_the_guest_and_the_backup_go_on(bench: Bench, counted: Counted) -> None:
    """Under the guest in its pause too. (A reader that cannot connect at all is an error.)"""

    def cut() -> None:
        bench.appliance.iscsi.refusals = 1
        bench.appliance.iscsi.cut_all()

    calls = ("snapshot", "read_into")
    plan = Calls(cut, *calls)
    with bench.controller(plan) as controller:
        assert bench.backup(controller, keep=False) == ""
        bench.see_that_the_guest_runs()
        bench.see_that_nothing_is_left(controller)
    assert not plan.left
    counted(f"iSCSI cut at {', '.join(calls)}, under the guest too: all went on", cases=len(calls))


def test_luns_that_stay_away_while_a_snapshot_is_read_fail_the_backup_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    monkeypatch.setattr(initiator, "_ANSWER_SECONDS", 2.0)

    def away() -> None:
        bench.appliance.iscsi.refusing = True
        bench.appliance.iscsi.cut_all()

    plan = Calls(away, "read_into")
    with bench.controller(plan) as controller:
        assert "cannot be read over iSCSI" in bench.backup(controller, keep=False)
        bench.appliance.iscsi.clear()
        bench.see_that_the_guest_runs()
        bench.see_that_nothing_is_left(controller)
    assert not plan.left
    counted("iSCSI away while a snapshot is read, under the guest too, and back", cases=1)


def _cases(given: list[str]) -> list[tuple[int, When]]:
    """Where to cut: everywhere where ``VMSNAP_ALL_CUTS`` is set. Each case is a backup, and from the snapshot on that
    takes seconds, so that else those are left out which find the appliance as another one does: what only asks leaves
    nothing behind, what was done is there before the next command too, and the disk of a duplicate is made as a
    snapshot is.
    """
    every = [(number, when) for number in range(len(given)) for when in When]
    if os.environ.get("VMSNAP_ALL_CUTS"):
        return every
    snapshot, last = given.index("cp"), {name: number for number, name in enumerate(given)}
    exported, changes = given.index("tgtadm bind"), [name not in ASKING for name in given]
    return [
        *((number, When.BEFORE) for number in range(snapshot + 2) if number == 0 or changes[number - 1]),
        *((number, When.DONE) for number in range(exported + 1) if changes[number]),
        (last["tgtadm bind"], When.DONE),
        (last["tgtadm delete"], When.DONE),
    ]
