"""The mechanism ``file`` fulfils the contract of its role, copying and reflinking."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.lab.xfs import mounted_xfs
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk, DiskSnapshot, Window
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.roles.filereader import FileReader
from vmsnap.testing.cloning import delete_all
from vmsnap.testing.rigs import SnapshotRig
from vmsnap.testing.snapshot import SnapshotContract, clone_all, contents_of, live
from vmsnap.testing.snapshot_machine import SnapshotMachine
from vmsnap_drivers.snapshots import file as file_mechanism
from vmsnap_drivers.snapshots.file import FileMechanism, can_reflink

SIZE = 1 << 20


def plain_disk(path: Path, size_bytes: int, device: str = "disk0") -> Disk:
    return Disk(device, str(path), size_bytes, handle={"plain_file": "yes"})


class FileRig(SnapshotRig):
    """Sparse files in a folder; the writer is the test itself."""

    def __init__(
        self, folder: Path, options: dict[str, str] | None = None, driver: type[FileMechanism] = FileMechanism
    ) -> None:
        self.scratch = folder
        self.options = {"way": "auto", **(options or {})}
        self.driver_class = driver
        self.images = folder / "images"
        self.images.mkdir()
        self.context = DriverContext(folder / "state", folder / "memory")
        self._disks = tuple(
            plain_disk(self.images / f"{name}.img", size, name) for name, size in (("disk0", SIZE), ("disk1", 3 * SIZE))
        )
        for disk in self._disks:
            with Path(disk.address).open("wb") as image:
                image.truncate(disk.size_bytes)
            for at in (0, 100 << 10, disk.size_bytes // 2, disk.size_bytes - 4096):
                self.write(disk, at, os.urandom(4096))

    def mechanism(self) -> SnapshotMechanism:
        return self.driver_class(self.context, self.options)

    def disks(self) -> tuple[Disk, ...]:
        return self._disks

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        with Path(disk.address).open("r+b") as image:
            image.seek(offset)
            image.write(data)

    def content(self, disk: Disk) -> bytes:
        return Path(disk.address).read_bytes()

    def pause(self) -> None:
        for disk in self._disks:
            with Path(disk.address).open("rb") as image:
                os.fsync(image)

    def resume(self) -> None:
        pass

    def traces(self) -> frozenset[str]:
        # the notes of folders stay: they are how strays are found
        return frozenset(
            str(path) for path in self.scratch.rglob("*") if not path.is_relative_to(self.context.state_dir)
        )

    def lose(self, disk: Disk, mechanism: SnapshotMechanism) -> None:
        for entry in mechanism.list_owned():
            Path(entry.name).unlink()


class TestCopies(SnapshotContract):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> FileRig:
        return FileRig(tmp_path, {"way": "copy"})


class TestCopiesInAnySequence(SnapshotMachine):
    rig = TestCopies.rig


def test_a_snapshot_that_follows_the_disk_is_caught_by_some_sequence(tmp_path: Path) -> None:
    class Follows(FileMechanism):
        def reader(self, snapshot: DiskSnapshot) -> FileReader:
            return FileReader(Path(snapshot.disk.address), snapshot.disk.size_bytes)

    class Patient(SnapshotMachine):
        examples = 300  # it ends with the first failure

    suite = Patient()
    with pytest.raises(AssertionError):
        suite.test_60_any_sequence_of_calls_gives_what_the_disks_held(FileRig(tmp_path, {"way": "copy"}, Follows))


class TestCopiesIntoAFolder(SnapshotContract):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> FileRig:
        (tmp_path / "snapshots").mkdir()
        return FileRig(tmp_path, {"folder": str(tmp_path / "snapshots")})


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real XFS on a loop device."""
    if os.geteuid() != 0:
        pytest.skip("mounting XFS needs root")
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("needs mkfs.xfs: apt-get install xfsprogs")
    with mounted_xfs(tmp_path_factory.mktemp("xfs")) as mount:
        yield mount


class TestReflinks(SnapshotContract):
    @pytest.fixture
    def rig(self, xfs: Path) -> Iterator[FileRig]:
        folder = xfs / "rig"
        folder.mkdir()
        yield FileRig(folder, {"way": "reflink"})
        shutil.rmtree(folder)

    def test_50_a_reflink_takes_no_room_and_no_time(self, xfs: Path) -> None:
        folder = xfs / "big"
        folder.mkdir()
        rig = FileRig(folder)
        big = plain_disk(folder / "big.img", 64 << 20)
        Path(big.address).write_bytes(os.urandom(big.size_bytes))
        os.sync()
        mechanism = rig.mechanism()
        plan = mechanism.plan("vm001", [big], "vmsnap-big", Window.FREE)
        assert plan.data["ways"] == ["reflink"]
        mechanism.prepare(plan)
        free = os.statvfs(folder).f_bfree
        (snapshot,) = mechanism.snapshot(plan)
        assert (free - os.statvfs(folder).f_bfree) * 4096 < 1 << 20
        with mechanism.reader(snapshot) as reader:
            assert sum(extent.length for extent in reader.extents() if not extent.zero) == big.size_bytes
        mechanism.delete(plan)
        shutil.rmtree(folder)


def test_only_files_that_their_hypervisor_vouches_for_are_handled(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    mechanism = FileMechanism(DriverContext(tmp_path, tmp_path), {})
    assert mechanism.handles(plain_disk(path, SIZE))
    assert not mechanism.handles(Disk("disk0", str(path), SIZE))
    assert not mechanism.handles(Disk("disk0", str(path), SIZE, format="qcow2", handle={"plain_file": "yes"}))
    assert not mechanism.handles(plain_disk(tmp_path, SIZE))
    assert not mechanism.handles(plain_disk(Path("/dev/null"), SIZE))


def test_holes_stay_holes(tmp_path: Path) -> None:
    rig = FileRig(tmp_path, {"way": "copy"})
    life = live(rig)
    for snapshot in life.snapshots:
        assert Path(snapshot.data["file"]).stat().st_blocks <= Path(snapshot.disk.address).stat().st_blocks
        with life.mechanism.reader(snapshot) as reader:
            assert any(extent.zero for extent in reader.extents())


def test_no_room_is_found_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = FileRig(tmp_path, {"way": "copy"})
    before = rig.traces()
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*real[:4], 3, *real[5:]))
    monkeypatch.setattr(file_mechanism.os, "statvfs", lambda _: full)
    with pytest.raises(SnapshotError, match="no room"):
        live(rig, "plan")
    assert rig.traces() == before


def test_a_disk_that_is_written_during_the_copy_is_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = FileRig(tmp_path, {"way": "copy"})
    copy = file_mechanism._copy_blocks

    def copy_while_the_guest_writes(reading: int, writing: int) -> None:
        copy(reading, writing)
        for disk in rig.disks():
            rig.write(disk, 0, b"later")

    monkeypatch.setattr(file_mechanism, "_copy_blocks", copy_while_the_guest_writes)
    with pytest.raises(SnapshotError, match="did not stand still"):
        live(rig, "snapshot")


def test_copying_works_where_the_kernel_cannot_copy_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(file_mechanism.os, "copy_file_range", refuse)
    rig = FileRig(tmp_path, {"way": "copy"})
    life = live(rig)
    assert contents_of(life.mechanism, life) == list(life.contents)


def test_a_plan_that_names_other_files_deletes_nothing(tmp_path: Path) -> None:
    rig = FileRig(tmp_path)
    life = live(rig, "plan")
    precious = tmp_path / "precious"
    precious.write_text("x")
    for name in (str(precious), f"{tmp_path}/{life.plan.tag}~1~snapshot", "relative~0~snapshot"):
        life.plan.data["files"][0] = name
        with pytest.raises(SnapshotError):
            life.mechanism.delete(life.plan)
    assert precious.exists()


def test_reflink_alone_is_refused_where_the_file_system_cannot(tmp_path: Path) -> None:
    rig = FileRig(tmp_path, {"way": "reflink"})
    if can_reflink(Path(rig.disks()[0].address), tmp_path):
        live(rig)
        return
    with pytest.raises(SnapshotError, match="cannot be reflinked"):
        live(rig, "plan")


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = FileRig(tmp_path)
    life = live(rig)
    stuck = Path(life.plan.data["files"][0])
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(SnapshotError, match=str(stuck)):
            life.mechanism.delete(life.plan)
    assert [entry.name for entry in life.mechanism.list_owned()] == [str(stuck)]
    life.mechanism.delete(life.plan)
    assert not life.mechanism.list_owned()


def test_clones_are_found_as_strays(tmp_path: Path) -> None:
    rig = FileRig(tmp_path)
    life = live(rig)
    clones: Sequence[Disk] = [clone.disk for clone in clone_all(rig, life, "bk.001")]
    life.mechanism.delete(life.plan)
    owned = rig.mechanism().list_owned()
    assert {(entry.kind, entry.name, entry.tag) for entry in owned} == {
        ("clone", clone.address, life.plan.tag) for clone in clones
    }


def test_the_notes_of_folders_of_clones_do_not_pile_up(tmp_path: Path) -> None:
    rig = FileRig(tmp_path)
    life = live(rig)
    notes = set((rig.context.state_dir / "file").iterdir())
    clones = clone_all(rig, life, "bk.001")
    assert len(set((rig.context.state_dir / "file").iterdir())) == len(notes) + 1
    delete_all(rig.mechanism(), clones)
    assert set((rig.context.state_dir / "file").iterdir()) == notes
    life.end()
