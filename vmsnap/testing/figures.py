"""What a driver's author wants to know of it in numbers: inherit one of these classes, with the fixtures of the
contract suite of the role, and each figure is printed below its test.

::

    class TestMyFigures(StorageFigures):
        storage = TestMyStorage.storage

They are measurements, and no contract: they fail where the driver does not do its work, and never for being slow.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from vmsnap.model import Window
from vmsnap.roles import CaptureRequest, StorageBackend
from vmsnap.testing.rigs import HypervisorRig, SnapshotRig, read_all, same

_MIB = 1 << 20
Show = Callable[[str], None]


class Figures:
    """What all measurements share."""

    rounds = 5
    """How often each is taken; the median is shown, and the worst."""

    @pytest.fixture
    def show(self, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Show:
        """Prints one line, past pytest's capturing."""

        def show(text: str) -> None:
            with capfd.disabled():
                sys.stdout.write(f"\n{request.node.name}: {text}")

        return show


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.2f} ms (at worst {max(seconds) * 1000:.2f})"


@contextmanager
def _clock(into: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    into.append(time.perf_counter() - begin)


class HypervisorFigures(Figures):
    """Needs the fixture `rig` of `vmsnap.testing.hypervisor.HypervisorContract`."""

    def test_how_long_the_guest_stands_still(self, rig: HypervisorRig, show: Show) -> None:
        """From `pause` to `resume`, by the moments that the driver gives, beside what it predicted; without disks."""
        pauses: list[float] = []
        copies: list[float] = []
        predicted, copied = None, 0
        for number in range(self.rounds):
            driver = rig.driver(rig.vm)
            request = CaptureRequest(f"bk{number}", 60.0)
            plan = driver.plan_capture(request)
            predicted = plan.predicted_pause_seconds
            driver.prepare(request, plan)
            stopped = driver.pause()
            duplicate = driver.duplicate()
            resumed = driver.resume()
            with _clock(copies):
                duplicate = driver.finish_duplicate(duplicate, lambda _: None)
            pauses.append((resumed.monotonic_ns - stopped.monotonic_ns) / 1e9)
            copied = sum(image.path.stat().st_blocks * 512 for image in duplicate.images)
            assert pauses[-1] > 0 and copied > 0
            driver.discard_duplicate(request.duplicate)
            driver.close()
        guess = "none" if predicted is None else f"{predicted * 1000:.2f} ms"
        show(f"{_median(pauses)}, predicted {guess}; {copied / _MIB:.0f} MiB of RAM, {_median(copies)} after the pause")
        assert rig.verdict(rig.vm) == ""


class SnapshotFigures(Figures):
    """Needs the fixture `rig` of `vmsnap.testing.snapshot.SnapshotContract`."""

    def test_how_long_a_snapshot_holds_the_guest_and_how_fast_it_is_read(self, rig: SnapshotRig, show: Show) -> None:
        """The call of `snapshot` for all disks at once, and reading them all."""
        holding: list[float] = []
        reading: list[float] = []
        size = 0
        for number in range(self.rounds):
            mechanism = rig.mechanism()
            plan = mechanism.plan(rig.vm, rig.disks(), f"vmsnap-figures-{number}", Window.FREE)
            mechanism.prepare(plan)
            rig.pause()
            contents = [rig.content(disk) for disk in plan.disks]
            with _clock(holding):
                snapshots = mechanism.snapshot(plan)
            rig.resume()
            mechanism.settle(snapshots)
            found = []
            with _clock(reading):
                for snapshot in snapshots:
                    with mechanism.reader(snapshot) as reader:
                        found.append(read_all(reader))
            assert same(found, contents)
            size = sum(map(len, found))
            mechanism.delete(plan)
        speed = size / _MIB / statistics.median(reading)
        show(f"{_median(holding)} for {len(rig.disks())} disks; read at {speed:.0f} MiB/s")


class StorageFigures(Figures):
    """Needs the fixture `storage` of `vmsnap.testing.storage.StorageContract`."""

    pack_bytes = 16 * _MIB

    def test_how_fast_packs_and_small_objects_move(self, storage: StorageBackend, show: Show) -> None:
        """One thread, packs as the repository has them, and objects of 1 KiB as manifests are."""
        data = os.urandom(self.pack_bytes)
        putting: list[float] = []
        getting: list[float] = []
        small: list[float] = []
        for number in range(self.rounds):
            with _clock(putting):
                storage.put(f"packs/{number}", data, if_absent=True)
            with _clock(getting):
                found = storage.get(f"packs/{number}")
            assert same(found, data)
            storage.delete(f"packs/{number}")
        for number in range(10 * self.rounds):
            with _clock(small):
                storage.put(f"manifests/{number}", data[:1024])
        assert len(list(storage.list("manifests/"))) == 10 * self.rounds
        fast = [f"{self.pack_bytes / _MIB / statistics.median(times):.0f} MiB/s" for times in (putting, getting)]
        show(f"put {fast[0]}, get {fast[1]}; small objects {_median(small)} each")
