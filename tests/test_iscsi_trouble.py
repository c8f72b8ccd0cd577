"""What goes wrong in a storage appliance in the middle of a whole backup of a VM that runs on its LUN: a name is taken,
a LUN is in use, rights are lost. Each time the guest runs, what failed is one clear line, and nothing is left: at once,
or, what cannot be removed yet, in the journal, from which ``recover`` removes it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests.appliance_here import TARGET, Bench, bench
from tests.lun_failures import written_by_somebody
from tests.test_file_mechanism import xfs
from tests.watching import Before
from vmsnap.errors import VmsnapError

__all__ = ["bench", "xfs"]
pytestmark = [pytest.mark.qemu, pytest.mark.lab, pytest.mark.sshd, pytest.mark.timeout(600)]

AUTHORITY = TARGET.partition(":")[0]
CONSISTENT = {"mode": "consistent", "timeout_seconds": 120}
NO_RIGHTS = "tgtd listens and does not let it in"


def exported(bench: Bench) -> list[str]:
    """The names of the targets beside the VM's."""
    return [name for name in bench.appliance.left() if name.startswith(AUTHORITY)]


def duplicate(bench: Bench) -> str:
    """The name of the one duplicate in the VM table."""
    with bench.controller() as controller:
        (name,) = (row.vm for row in controller.table.rows() if row.kind == "duplicate")
    return name


def test_a_name_that_somebody_takes_in_the_pause_fails_the_backup_alone(bench: Bench) -> None:
    taken = []

    def take() -> None:
        (image,) = (name for name in bench.appliance.left() if name.endswith("~0~snapshot.iscsi"))
        taken.append(f"{AUTHORITY}:{image.partition('~')[0]}.0")
        bench.appliance.server.add(taken[0], None)

    with bench.controller(Before({"settle": take})) as controller:
        problem = bench.backup(controller)
        assert f"there is an iSCSI target {taken[0]} already, which is left alone" in problem
        bench.see_that_the_guest_runs()
        assert bench.appliance.left() == taken
        bench.appliance.server.remove(taken[0])
        bench.see_that_nothing_is_left(controller)


@pytest.mark.parametrize(
    ("prefix", "how"), [("bk-", {"keep_duplicate": True}), ("run-", CONSISTENT)], ids=["held", "consistent"]
)
def test_a_duplicates_name_that_somebody_takes_is_left_to_them(bench: Bench, prefix: str, how: dict[str, Any]) -> None:
    """The backup is stored all the same where the duplicate was to be held alone."""
    taken = []

    def take() -> None:
        taken.append(f"{AUTHORITY}:{duplicate(bench).replace('bk-', prefix)}")
        bench.appliance.server.add(taken[0], None)

    with bench.controller(Before({"plan_clone": take})) as controller:
        problem = bench.backup(controller, **how)
        assert f"there is an iSCSI target {taken[0]} already, which is left alone" in problem
        bench.see_that_the_guest_runs()
        assert bench.appliance.left() == taken
        bench.appliance.server.remove(taken[0])
        bench.see_that_nothing_is_left(controller)


def test_a_lun_in_use_at_the_release_is_kept_and_removed_when_nobody_uses_it(bench: Bench) -> None:
    """That of a duplicate that has ended: the backup is whole, and says what is left and who uses it."""
    with contextlib.ExitStack() as somebody:

        def use() -> None:
            (target,) = (name for name in exported(bench) if ":run-" in name)
            somebody.enter_context(written_by_somebody(bench.appliance.address.replace(TARGET, target)))

        with bench.controller(Before({"delete_clone": use})) as controller:
            warning = bench.backup(controller, **CONSISTENT)
            assert "not removed yet, vmsnap recover will try again" in warning
            assert "is in use by iqn.2008-11.org.linux-kvm" in warning
            bench.see_that_the_guest_runs()
            (kept,) = controller.recover().kept
            assert "is in use by" in kept and "\n" not in kept
            assert [name for name in exported(bench) if ":run-" in name]
            somebody.close()
            bench.see_that_nothing_is_left(controller)


def test_a_held_duplicates_lun_that_somebody_uses_is_not_discarded(bench: Bench) -> None:
    with bench.controller() as controller:
        held = controller.backup("vm001", bench.repository, keep_duplicate=True, max_pause_seconds=60).duplicate
        with written_by_somebody(bench.appliance.address.replace(TARGET, f"{AUTHORITY}:{held}")):
            with pytest.raises(VmsnapError, match=r"is given up, but not all of it is removed: .* is in use by") as e:
                controller.discard_duplicate(held)
            assert "\n" not in str(e.value) and exported(bench) == [f"{AUTHORITY}:{held}"]
            bench.see_that_the_guest_runs()
        bench.see_that_nothing_is_left(controller)


def test_without_rights_nothing_is_paused(bench: Bench) -> None:
    before = [event["event"] for event in bench.machine.oracle.events()].count("STOP")
    with bench.controller() as controller, bench.appliance.without_rights():
        assert NO_RIGHTS in bench.backup(controller)
        assert controller.journal.unfinished() == []
    assert [event["event"] for event in bench.machine.oracle.events()].count("STOP") == before
    assert bench.appliance.left() == []
    bench.see_that_the_guest_runs()


@pytest.mark.parametrize("lost_at", ["settle", "delete_snapshots"])
def test_what_is_made_is_not_forgotten_where_rights_are_lost(bench: Bench, lost_at: str) -> None:
    """After the snapshot the backup fails; at the release it is whole. A target that cannot be asked for is still
    there: tgtadm says the same where no tgtd runs.
    """
    with contextlib.ExitStack() as lost:
        plan = Before({lost_at: lambda: lost.enter_context(bench.appliance.without_rights())})
        with bench.controller(plan) as controller:
            problem = bench.backup(controller)
            assert NO_RIGHTS in problem and ("not removed yet" in problem) == (lost_at == "delete_snapshots")
            bench.see_that_the_guest_runs()
            left = bench.appliance.left()
            (kept,) = controller.recover().kept
            assert NO_RIGHTS in kept and "\n" not in kept
            assert bench.appliance.left() == left and len(exported(bench)) == (lost_at == "delete_snapshots")
            lost.close()
            bench.see_that_nothing_is_left(controller)
