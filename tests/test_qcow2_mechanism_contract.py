"""The mechanism qcow2 keeps the contract of its role, on real QEMUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.qemus import available_qemus
from tests.test_qcow2_mechanism_machine import Machine
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.rigs import SnapshotRig
from vmsnap.testing.snapshot import SnapshotContract, contents_of, live
from vmsnap_drivers.snapshots.qcow2 import Qcow2Mechanism
from vmsnap_drivers.snapshots.qcow2.names import PlanNames, choose_names

pytestmark = pytest.mark.qemu


class Qcow2Rig(SnapshotRig):
    """The writable disks of a QEMU without a guest."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.context = DriverContext(state_dir=folder, memory_dir=folder)
        self._disks = tuple(disk for disk in machine.disks() if not disk.read_only)
        self._made: list[SnapshotMechanism] = []

    def mechanism(self) -> SnapshotMechanism:
        self._made.append(Qcow2Mechanism(self.context, {}))
        return self._made[-1]

    def close(self) -> None:
        """Let the monitor go."""
        for mechanism in self._made:
            mechanism.close()

    def disks(self) -> tuple[Disk, ...]:
        return self._disks

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        if disk.handle:
            self.machine.write(disk, offset, data)
            return
        with Path(disk.address).open("r+b") as clone:
            clone.seek(offset)
            clone.write(data)

    def content(self, disk: Disk) -> bytes:
        return self.machine.content(disk) if disk.handle else self.machine.convert(Path(disk.address), disk.format)

    def pause(self) -> None:
        self.machine.pause(Window.FREE)

    def resume(self) -> None:
        self.machine.resume(Window.FREE)

    def end_vm(self) -> None:
        """Kill QEMU; another one is started, for the scenarios to come."""
        self.machine.stop()
        self.machine.start()

    def traces(self) -> frozenset[str]:
        state = self.context.state_dir / "qcow2"
        kept = [str(path) for path in state.rglob("*") if not path.is_dir()] if state.exists() else []
        # Nodes without a name of their own are numbered anew by each QEMU.
        return frozenset([re.sub(r"#block\d+", "#block", self.machine.traces()), *kept])

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        for export in self.machine.oracle.execute("query-block-exports"):
            if export["id"].endswith("-0-access"):
                self.machine.oracle.execute("block-export-del", id=export["id"], mode="hard")


@pytest.fixture(scope="module", params=available_qemus(), ids=lambda build: f"qemu{build.version}")
def shared_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One QEMU for all scenarios: each leaves it as it was."""
    made = Machine(request.param, tmp_path_factory.mktemp("machine"))
    try:
        made.scribble(made.disks())
        yield made
    finally:
        made.stop()


class TestQcow2Mechanism(SnapshotContract):
    @pytest.fixture
    def rig(self, shared_machine: Machine, tmp_path: Path) -> Iterator[Qcow2Rig]:
        made = Qcow2Rig(shared_machine, tmp_path)
        yield made
        made.close()

    def test_04_every_name_that_is_made_carries_the_tag(self, rig: SnapshotRig) -> None:
        """A VM has one snapshot of this mechanism at a time (a filter can be taken out of the graph at its top only,
        and QEMU has one NBD server): a second one is refused, and the first not touched."""
        life = live(rig, tag="vmsnap-twin-0")
        owned = life.mechanism.list_owned()
        assert owned and all(life.plan.tag in entry.name and entry.tag == life.plan.tag for entry in owned)
        with pytest.raises(SnapshotError, match="covered by the block node vmsnap-"):
            rig.mechanism().plan(rig.vm, rig.disks(), "vmsnap-twin-1", Window.FREE)
        assert contents_of(rig.mechanism(), life) == list(life.contents)
        life.end()
        assert not rig.mechanism().list_owned()

    def test_32_delete_touches_nothing_that_does_not_stand_in_the_plan(self, rig: SnapshotRig) -> None:
        """Tags that begin alike are not the same; the other plans were made before this one's snapshot."""
        others = [rig.mechanism().plan(rig.vm, rig.disks(), f"vmsnap-one{end}", Window.FREE) for end in ("", "-11")]
        kept = live(rig, tag="vmsnap-one-1")
        with_kept = rig.traces()
        for other in others:
            rig.mechanism().delete(other)
        assert rig.traces() == with_kept
        assert contents_of(rig.mechanism(), kept) == list(kept.contents)
        kept.end()


def test_names_are_unique_short_and_found_again(tmp_path: Path) -> None:
    handle = {"qmp": "/q", "node": "n", "qdev": "d", "file": "/images/a"}
    disks = tuple(Disk(f"disk{number}", "/images/a", 1, handle=handle) for number in range(100))
    tag = "vmsnap-" + "x" * 57
    names = choose_names(tag, disks, (tmp_path,) * 100, tmp_path, overlays=True, bitmaps=("",) * 100)
    nodes = [name for own in names.disks for name in (own.filter, own.target, own.access, own.overlay, own.image)]
    assert len(set(nodes)) == 500 and max(map(len, nodes)) <= 31
    assert all(tag in own.target_file and tag in own.overlay_file for own in names.disks)
    other = choose_names("vmsnap-y", disks, (tmp_path,) * 100, tmp_path, overlays=True, bitmaps=("",) * 100)
    assert not {own.filter for own in names.disks} & {own.filter for own in other.disks}
    assert replace(names) == names and PlanNames(**vars(names)) == names
