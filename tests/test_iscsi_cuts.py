"""The network to a storage appliance is cut at each command that vmsnap gives it: before the command, and after it was
done but before its answer. And the connections to LUNs are cut, the guest's own and those by which a snapshot is read.
Each time the guest runs, what failed is one clear line, and nothing is left: at once, or, as long as the appliance
cannot be reached, in the journal, from which ``recover`` removes it when it is back.

The appliance is this host: a real tgtd over files on a real XFS, and a real SSH server, each behind a proxy that cuts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.appliance_here import Bench, Commands, When, bench, commands
from tests.conftest import Counted
from tests.lab import serial
from tests.lab.qmp import seconds_between
from tests.left_out import EXHAUSTIVE
from tests.qemu_stage import until
from tests.test_file_mechanism import xfs
from tests.watching import Before
from vmsnap.controller import Controller
from vmsnap.errors import VmsnapError
from vmsnap_drivers import runner_ssh
from vmsnap_drivers.snapshots.iscsi import initiator

__all__ = ["bench", "commands", "xfs"]
pytestmark = [
    pytest.mark.qemu, pytest.mark.lab, pytest.mark.sshd, pytest.mark.timeout(7200 if EXHAUSTIVE else 900)
]  # fmt: skip

ASKING = frozenset(["tgtadm show", "stat", "test", "sync"])
"""Commands that change nothing."""
CONSISTENT = {"mode": "consistent", "timeout_seconds": 120}


def test_the_appliance_vanishes_at_each_command_before_it_and_when_it_was_done(
    bench: Bench, commands: Commands, counted: Counted
) -> None:
    given = _given(bench, commands, keep_duplicate=True)
    cases, kept_ones, cut_recoveries = _cases(given), 0, 0
    exported = given.index("tgtadm bind")
    for number, when in cases:
        recover_cut = (number, when) == (exported, When.DONE)
        kept, cuts = _cut_at(bench, commands, given, number, when, recover_cut=recover_cut, keep_duplicate=True)
        kept_ones, cut_recoveries = kept_ones + kept, cut_recoveries + cuts
    counted(
        f"SSH cut {len(cases)} times at {len(given)} commands of a backup, and at {cut_recoveries} of its recovery;"
        f" {kept_ones} times something was kept in the journal until the appliance was back",
        cases=len(cases) + cut_recoveries,
    )
    assert cut_recoveries > 3 and kept_ones > len(cases) / 2


def test_the_appliance_vanishes_while_a_consistent_backup_has_a_duplicate_there(
    bench: Bench, commands: Commands, counted: Counted
) -> None:
    """When the duplicate's LUN is exported, before that is removed, and when all but the last command is done."""
    given = _given(bench, commands, **CONSISTENT)
    exports = [number for number, name in enumerate(given) if name == "tgtadm bind"]
    removals = [number for number, name in enumerate(given) if name == "tgtadm delete"]
    assert len(exports) == len(removals) == 2, given
    chosen = [(exports[1], When.DONE), (removals[0], When.BEFORE), (removals[1], When.DONE)]
    cases = _everywhere(given) if EXHAUSTIVE else chosen
    kept_ones = sum(_cut_at(bench, commands, given, number, when, **CONSISTENT)[0] for number, when in cases)
    counted(
        f"SSH cut {len(cases)} times at {len(given)} commands of a consistent backup; {kept_ones} times something was"
        " kept in the journal until the appliance was back",
        cases=len(cases),
    )
    assert kept_ones >= len(chosen)


def _given(bench: Bench, commands: Commands, **how: Any) -> list[str]:
    """The commands of a backup that nothing happens to."""
    with bench.controller() as controller:
        commands.arm()
        assert bench.backup(controller, **how) == ""
        given = list(commands.given)
        bench.see_that_nothing_is_left(controller)
    return given


def _cut_at(
    bench: Bench,
    commands: Commands,
    given: list[str],
    number: int,
    when: When,
    *,
    recover_cut: bool = False,
    **how: Any,
) -> tuple[bool, int]:
    """A backup whose appliance vanishes at one command; says whether something was left there, and how often its
    recovery was cut too.
    """
    case, cut_recoveries = f"command {number} ({given[number]}), {when.value}", 0
    with bench.controller() as controller:
        commands.arm(number, when)
        problem = bench.backup(controller, **how)
        assert commands.struck and bench.appliance.ssh.refusing, case
        assert f"ssh://root@127.0.0.1:{bench.appliance.ssh.port}" in problem, f"{case}: {problem!r}"
        bench.see_that_the_guest_runs()
        kept = controller.recover().kept
        assert all("\n" not in line for line in kept), case
        left = bench.appliance.left()
        assert not left or (kept and controller.journal.unfinished()), f"{case}: {left}"
        bench.appliance.come_back()
        if recover_cut:
            cut_recoveries = _cut_recovery(bench, controller, commands)
        commands.arm()
        bench.see_that_nothing_is_left(controller)
    return bool(left), cut_recoveries


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
        # The first is a trial, before the pause.
        commands.arm("cp", When.DONE, earlier=1, silently=True)
        problem = bench.backup(controller)
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
    plan = Before(dict.fromkeys(calls, cut))
    with bench.controller(plan) as controller:
        assert bench.backup(controller) == ""
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

    plan = Before({"read_into": away})
    with bench.controller(plan) as controller:
        assert "cannot be read over iSCSI" in bench.backup(controller)
        bench.appliance.iscsi.clear()
        bench.see_that_the_guest_runs()
        bench.see_that_nothing_is_left(controller)
    assert not plan.left
    counted("iSCSI away while a snapshot is read, under the guest too, and back", cases=1)


def test_a_duplicate_takes_over_while_no_command_reaches_its_appliance(bench: Bench, counted: Counted) -> None:
    """It needs its LUN alone, and while that is away too, nothing is lost. It ends the VM of this module, so that it
    stands last.
    """
    machine, appliance = bench.machine, bench.appliance
    with bench.controller() as controller:
        held = controller.backup("vm001", bench.repository, keep_duplicate=True, max_pause_seconds=60).duplicate
        (row,) = (row for row in controller.table.rows() if row.vm == held)
        after = machine.wait_for_count(machine.latest_count() + 20)
        machine.kill()
        begun = len(machine.serial_text())
        appliance.vanish()
        appliance.iscsi.refusing = True
        with pytest.raises(VmsnapError) as failed:
            controller.failover("vm001")
        assert "\n" not in str(failed.value) and [each.duplicate for each in controller.duplicates()] == [held]
        appliance.iscsi.clear()
        result = controller.failover("vm001")
        assert result.duplicate == held and controller.table.get("vm001").disks[0].address == row.disks[0].address
        until(lambda: len(serial.counts(machine.serial_text()[begun:])) > 3, "it goes on", 200)
        text = machine.serial_text()[begun:]
        assert serial.faults(text) == [] and serial.counts(text)[0] <= after + 20
        appliance.come_back()
        assert controller.recover().kept == () and controller.journal.unfinished() == []
    counted("failover with the appliance's SSH away, and with its LUNs away first", cases=2)


def _cases(given: list[str]) -> list[tuple[int, When]]:
    """Where to cut a live backup: everywhere where nothing is left out. Each case is a backup, and from the
    snapshot on that takes seconds, so that else those are left out which find the appliance as another one does: what
    only asks leaves nothing behind, what was done is there before the next command too, and the disk of a duplicate is
    made as a snapshot is.
    """
    if EXHAUSTIVE:
        return _everywhere(given)
    snapshot, last = given.index("cp"), {name: number for number, name in enumerate(given)}
    exported, changes = given.index("tgtadm bind"), [name not in ASKING for name in given]
    return [
        *((number, When.BEFORE) for number in range(snapshot + 2) if number == 0 or changes[number - 1]),
        *((number, When.DONE) for number in range(exported + 1) if changes[number]),
        (last["tgtadm bind"], When.DONE),
        (last["tgtadm delete"], When.DONE),
    ]


def _everywhere(given: list[str]) -> list[tuple[int, When]]:
    return [(number, when) for number in range(len(given)) for when in When]
