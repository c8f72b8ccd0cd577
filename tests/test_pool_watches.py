"""What the watches of pools do and tell, look by look; on real pools they are shown in ``tests/in_guest``, and on
a real zfs-fuse in ``tests/test_zfs_failures.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, SnapshotPlan, Window
from vmsnap.testing.rigs import eventually
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.snapshots.iscsi import watch as iscsi_watch
from vmsnap_drivers.snapshots.iscsi.stores import Fill
from vmsnap_drivers.snapshots.lvm import watch as lvm_watch
from vmsnap_drivers.snapshots.lvm.commands import Lvm
from vmsnap_drivers.snapshots.lvm.names import VolumeNames, to_data
from vmsnap_drivers.snapshots.zfs import watch as zfs_watch
from vmsnap_drivers.snapshots.zfs.commands import Zfs

FULL = "vg-vmsnap--t.0: 0 65536 snapshot Invalid\n"
WELL = "vg-vmsnap--t.0: 0 65536 snapshot 32/16384 32\n"
FAILS = "fails"


class TellingLvm(Lvm):
    """Device mapper tells one thing after the other."""

    def __init__(self, *told: str) -> None:
        super().__init__(LocalRunner())
        self._told = iter(told)

    def status(self) -> str:
        told = next(self._told)
        if told == FAILS:
            raise SnapshotError("dmsetup status failed: a moment ago")
        return told


@pytest.mark.parametrize(
    ("told", "mentioned"),
    [((FAILS, FULL), True), ((FAILS, WELL, FULL), False)],
    ids=["the look before", "an earlier look"],
)
def test_a_look_that_failed_is_the_reason_of_a_loss_until_one_succeeds(told: Sequence[str], mentioned: bool) -> None:
    names = VolumeNames("vg", "disk0", "uuid", "vmsnap-t.0", "/dev/vg/disk0", "", 1 << 20)
    disk = Disk("disk0", "/dev/vg/disk0", 1 << 20)
    plan = SnapshotPlan("lvm", "vmsnap-t", "vm001", (disk,), Window.FREE, to_data((names,)))
    watch = lvm_watch.Watch(TellingLvm(*told), plan, True, 90)
    watch.look()
    assert watch.problem(names) == "dmsetup status failed: a moment ago"
    for _ in told[1:]:
        watch.look()
    assert watch.given_up(names).startswith("the guest overwrote more than the 1048576 bytes")
    assert ("a moment ago" in watch.problem(names)) is mentioned


class TellingZfs(Zfs):
    """A pool that is used to so many percent, one look after the other; None: it cannot be asked."""

    def __init__(self, *used: int | None) -> None:
        super().__init__(LocalRunner())
        self._used = iter(used)
        self._last: int | None = None
        self.looks = 0

    def properties(self, names: Sequence[str], wanted: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        self._last = next(self._used, self._last)
        self.looks += 1
        if self._last is None:
            raise SnapshotError("zfs get failed: a moment ago")
        return {name: {"used": str(self._last), "available": str(100 - self._last)} for name in names}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (iscsi_watch, zfs_watch):
        monkeypatch.setattr(module, "_EVERY_SECONDS", 0.001)


@pytest.fixture
def watching(quick: None) -> Iterator[Callable[[zfs_watch.Watch], zfs_watch.Watch]]:
    begun: list[zfs_watch.Watch] = []

    def begin(watch: zfs_watch.Watch) -> zfs_watch.Watch:
        begun.append(watch)
        watch.start()
        return watch

    yield begin
    for watch in begun:
        watch.stop()


def test_a_zfs_pool_that_fills_up_is_told_of_and_what_failed_before_is_no_reason(
    watching: Callable[[zfs_watch.Watch], zfs_watch.Watch],
) -> None:
    pool, gone = TellingZfs(None, 50, 85), []
    watch = watching(zfs_watch.Watch(pool, ["tank/a"], 90, lambda: gone.append(1)))
    eventually(lambda: bool(watch.threats()), "the threat")
    (threat,) = watch.threats()
    assert threat.subject == "pool tank" and threat.message.startswith("85% of it is used: from 90% on")
    eventually(lambda: not watch.problem(), "the failure is forgotten")
    assert not gone and not watch.given_up()


def test_zfs_snapshots_that_are_given_up_go_even_if_the_pool_has_room_again(
    watching: Callable[[zfs_watch.Watch], zfs_watch.Watch],
) -> None:
    pool, tried = TellingZfs(95, 10), []

    def give_up() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise SnapshotError("it is busy")

    watch = watching(zfs_watch.Watch(pool, ["tank/a"], 90, give_up))
    eventually(lambda: len(tried) >= 2, "it is tried again")
    assert watch.problem() == "pool tank is full to 95%, and the snapshot was given up to spare the guests"
    assert pool.looks == 1


def test_of_two_luns_in_one_pool_the_second_is_judged_by_what_the_first_has_freed(quick: None) -> None:
    used, gone = [0.97], []

    def give_up(snapshot: str, left: float) -> None:
        if snapshot not in gone:  # it is called again at each look
            gone.append(snapshot)
            used[0] = left

    def watched(snapshot: str, left: float) -> iscsi_watch.Watched:
        return iscsi_watch.Watched(
            snapshot, lambda: Fill("the thin pool vg/pool", used[0]), lambda: give_up(snapshot, left)
        )

    watch = iscsi_watch.Watch("vmsnap-t", [watched("a", 0.93), watched("b", 0.0)])
    watch.start()
    try:
        eventually(lambda: gone == ["a"] and "93%" in str(watch.threats()), "the second look")
        assert [threat.subject for threat in watch.threats()] == ["the thin pool vg/pool"]
        assert watch.given_up("a") and not watch.given_up("b")
        used[0] = 0.96
        eventually(lambda: gone == ["a", "b"], "the second goes when it must")
    finally:
        watch.stop()
