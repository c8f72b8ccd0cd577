"""The mechanism ``file``: plain image files, cloned by reflink where the file system can, else copied in the pause.

It takes disks for which their hypervisor driver vouches, by ``handle["plain_file"] == "yes"``, that the file alone
holds the disk and stays as it is from the return of `pause` to `resume`. The simulated hypervisor says so always; a
driver of a hypervisor that caches, or that a stopped VM's image is left to, says so while the VM does not execute.
Nobody else can know: a raw file may be the base of an overlay, or be written behind the hypervisor's back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmsnap.durable import make_writable_folder
from vmsnap.errors import SnapshotError
from vmsnap.model import (
    ClonePlan,
    Disk,
    DiskSnapshot,
    Finding,
    Moment,
    OwnedResource,
    SnapshotPlan,
    Window,
    check_name,
)
from vmsnap.roles import PATH, DriverContext, Option, SnapshotMechanism, with_defaults
from vmsnap.roles.filereader import FileReader, next_data

REFLINK, COPY = "reflink", "copy"
_FICLONE = 0x40049409
_CANNOT_COPY_IN_KERNEL = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_BLOCK_BYTES = 64 << 20
_TAG = re.compile(r"vmsnap-[A-Za-z0-9._-]+")
# "~" stands in no tag and no name, so that the parts cannot be mistaken for each other
_OURS = re.compile(r"(?P<tag>vmsnap-[A-Za-z0-9._-]+)~\d+~(?:[A-Za-z0-9._-]+~)?(?P<kind>snapshot|clone)")


class FileMechanism(SnapshotMechanism):
    """Point-in-time copies of plain files.

    A reflink takes milliseconds whatever the size. A copy takes as long as copying takes, with the guest standing
    still: option ``way=reflink`` refuses that. Clones are whole copies, named by their duplicate; they live on when
    the snapshot is deleted, and are listed as owned.
    """

    name = "file"
    options = (
        Option("folder", "where snapshots and clones are made; without it, beside each disk", type=PATH),
        Option("way", "how a file is copied; auto: reflink where it can be", "auto", ("auto", REFLINK, COPY)),
    )
    clones = True

    def __init__(self, context: DriverContext, options: Mapping[str, str]) -> None:
        """Remember context and checked options; no I/O."""
        super().__init__(context, options)
        self._folder = PATH.read(options["folder"]).absolute() if options.get("folder") else None
        self._way = with_defaults(self.options, options)["way"]

    def handles(self, disk: Disk) -> bool:
        """Raw plain files that their hypervisor vouches for."""
        if disk.format != "raw" or disk.handle.get("plain_file") != "yes" or not disk.address.startswith("/"):
            return False
        try:
            return stat.S_ISREG(os.stat(disk.address).st_mode)  # noqa: PTH116 - an address, not a path of ours
        except (OSError, ValueError):
            return False

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """Choose reflink or copy for each disk, and see that there is room; see the role."""
        if not _TAG.fullmatch(tag):
            raise SnapshotError(f"{tag!r} is no tag")
        files, ways = [], []
        for index, disk in enumerate(disks):
            if not self.handles(disk):
                raise SnapshotError(f"{disk.device} at {disk.address} is no plain file that may be copied")
            path = (self._folder or Path(disk.address).parent) / f"{tag}~{index}~snapshot"
            files.append(str(path))
            ways.append(self._choose_way(disk, path.parent))
        plan = SnapshotPlan(self.name, tag, vm, tuple(disks), window, {"files": files, "ways": ways})
        _check_room(plan)
        return plan

    def _choose_way(self, disk: Disk, folder: Path) -> str:
        if self._way == COPY:
            return COPY
        if can_reflink(Path(disk.address), folder):
            return REFLINK
        if self._way == REFLINK:
            raise SnapshotError(f"{disk.address} cannot be reflinked into {folder}", cure="use XFS or btrfs")
        return COPY

    def prepare(self, plan: SnapshotPlan) -> None:
        """Make the files, empty; see the role."""
        _check_room(plan)
        for path in _files(plan):
            self._note_folder(path.parent)
            _create(path)

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """Reflink or copy each disk; see the role."""
        taken = []
        for disk, path, way in zip(plan.disks, _files(plan), plan.data["ways"], strict=True):
            instant = Moment.now("snapshot")
            _copy(Path(disk.address), path, way)
            taken.append(DiskSnapshot(plan, disk, instant, {"file": str(path), "way": way}))
        return tuple(taken)

    def reader(self, snapshot: DiskSnapshot) -> FileReader:
        """Open the snapshot's file; see the role."""
        return FileReader(_file_of(snapshot), snapshot.disk.size_bytes)

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """A file in `folder`; lasting or not makes no difference, a copy leans on nothing. See the role."""
        source = _file_of(snapshot)
        index = _files(snapshot.plan).index(source)
        path = folder.absolute() / f"{snapshot.plan.tag}~{index}~{check_name(name, 'duplicate name')}~clone"
        if self._way == COPY or not can_reflink(source, path.parent):
            _check_room_for_copy(source, path.parent)
        return ClonePlan(
            self.name, snapshot.plan, snapshot.disk.device, name, path.parent, lasting, {"file": str(path)}
        )

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """Copy the snapshot's file, by reflink where it can be; see the role."""
        source, path = _file_of(snapshot), _file_of_clone(plan)
        self._note_folder(path.parent)
        _create(path)
        _copy(source, path, REFLINK if self._way != COPY and can_reflink(source, path.parent) else COPY)
        return Disk(snapshot.disk.device, str(path), snapshot.disk.size_bytes, handle={"plain_file": "yes"})

    def delete_clone(self, plan: ClonePlan) -> None:
        """Remove the clone's file; see the role."""
        path = _file_of_clone(plan)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            pass
        except OSError as e:
            raise SnapshotError(f"{path} could not be removed: {e.strerror}") from e
        # each duplicate has a folder of its own: their notes must not pile up
        if not any(path.parent.glob("vmsnap-*")):
            self._note_of(path.parent).unlink(missing_ok=True)

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> FileReader:
        """Open the clone's file; see the role."""
        return FileReader(_file_of_clone(plan), disk.size_bytes, "the clone")

    def delete(self, plan: SnapshotPlan) -> None:
        """Remove the plan's files; see the role."""
        left = []
        for path in _files(plan):
            try:
                path.unlink(missing_ok=True)
            except NotADirectoryError:
                continue
            except OSError as e:
                left.append(f"{path} ({e.strerror})")
        if left:
            raise SnapshotError(f"could not be removed: {', '.join(left)}")

    def list_owned(self) -> Sequence[OwnedResource]:
        """Snapshots and clones in every folder that was ever used, by their names."""
        folders = {Path(note.read_text()) for note in self._notes().glob("*.folder")}
        if self._folder is not None:
            folders.add(self._folder)
        owned = []
        for folder in sorted(folders):
            for path in sorted(folder.glob("vmsnap-*")):
                found = _OURS.fullmatch(path.name)
                if found:
                    owned.append(OwnedResource(found["kind"], str(path), found["tag"], self.name))
        return owned

    def remove_owned(self, owned: OwnedResource) -> None:
        """Remove the file; see the role."""
        if owned not in self.list_owned():
            return
        try:
            Path(owned.name).unlink(missing_ok=True)
        except OSError as e:
            raise SnapshotError(f"{owned.name} could not be removed: {e.strerror}") from e

    def _notes(self) -> Path:
        return self.context.state_dir / self.name

    def _note_of(self, folder: Path) -> Path:
        return self._notes() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.folder"

    def _note_folder(self, folder: Path) -> None:
        # files lie beside disks anywhere on the host; without these notes nobody would know where to look for strays
        notes = self._notes()
        make_writable_folder(notes)
        note = self._note_of(folder)
        if not note.exists():
            partial = note.with_suffix(f".{os.getpid()}")
            partial.write_text(str(folder))
            partial.rename(note)

    def doctor(self) -> Sequence[Finding]:
        """Say whether files here can be reflinked."""
        if self._folder is None:
            return [Finding("file", "ok", "reflink or copy, as the file system of each disk can")]
        if not os.access(self._folder, os.W_OK | os.X_OK):
            return [Finding("folder", "missing", f"{self._folder} cannot be written", f"mkdir -p {self._folder}")]
        return [Finding("folder", "ok", str(self._folder))]


def can_reflink(source: Path, folder: Path) -> bool:
    """Try it on a file without a name: nothing is left, whatever happens."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            trial = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, trial)
            fcntl.ioctl(trial, _FICLONE, descriptor)
        except OSError:
            return False
    return True


def _files(plan: SnapshotPlan) -> list[Path]:
    """The plan's files; refuses a plan that names others than ours, since they will be deleted."""
    paths = [Path(name) for name in plan.data["files"]]
    for index, path in enumerate(paths):
        if path.name != f"{plan.tag}~{index}~snapshot" or not _TAG.fullmatch(plan.tag) or not path.is_absolute():
            raise SnapshotError(f"the plan {plan.tag!r} names {path}, which is no snapshot of it")
    return paths


def _file_of(snapshot: DiskSnapshot) -> Path:
    path = Path(snapshot.data["file"])
    if path not in _files(snapshot.plan):
        raise SnapshotError(f"{path} does not stand in the plan {snapshot.plan.tag!r}")
    return path


def _file_of_clone(plan: ClonePlan) -> Path:
    """The clone's file; refuses a plan that names another than ours, since it will be deleted."""
    path = Path(plan.data["file"])
    found = _OURS.fullmatch(path.name)
    ours = found is not None and found["kind"] == "clone" and found["tag"] == plan.snapshot.tag
    if not ours or path.parent != plan.folder or not path.is_absolute():
        raise SnapshotError(f"the plan of a clone for {plan.name!r} names {path}, which is no clone of it")
    return path


def _check_room(plan: SnapshotPlan) -> None:
    needed: dict[Path, int] = {}
    for disk, path, way in zip(plan.disks, _files(plan), plan.data["ways"], strict=True):
        if way == COPY:
            try:
                # a sparse file's blocks, not its size: holes are not copied
                bytes_used = Path(disk.address).stat().st_blocks * 512
            except OSError as e:
                raise SnapshotError(f"{disk.device} at {disk.address}: {e.strerror}") from e
            needed[path.parent] = needed.get(path.parent, 0) + bytes_used
    by_device: dict[int, int] = {}
    for folder, size in needed.items():
        try:
            device, room = folder.stat().st_dev, os.statvfs(folder)
        except OSError as e:
            raise SnapshotError(f"snapshots cannot be made in {folder}: {e.strerror}") from e
        by_device[device] = by_device.get(device, 0) + size
        free = room.f_bavail * room.f_frsize
        if by_device[device] > free:
            raise SnapshotError(
                f"no room for the snapshot in {folder}: it needs {by_device[device]} bytes, {free} are free",
                cure="make room, or choose another folder with the option folder",
            )


def _check_room_for_copy(source: Path, folder: Path) -> None:
    try:
        needed, room = source.stat().st_blocks * 512, os.statvfs(folder)
    except OSError as e:
        raise SnapshotError(f"{source} cannot be copied to {folder}: {e.strerror}") from e
    if needed > room.f_bavail * room.f_frsize:
        raise SnapshotError(
            f"no room for a clone in {folder}: it needs {needed} bytes, {room.f_bavail * room.f_frsize} are free",
            cure="make room there",
        )


def _create(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except OSError as e:
        raise SnapshotError(f"cannot make {path}: {e.strerror}") from e


def _copy(source: Path, target: Path, way: str) -> None:
    """Give `target` the content of `source`.

    :raises SnapshotError: it failed, or `source` changed meanwhile
    """
    with contextlib.ExitStack() as stack:
        try:
            reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, reading)
            writing = os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, writing)
            before = _version(reading)
            if way == REFLINK:
                fcntl.ioctl(writing, _FICLONE, reading)
            else:
                _copy_blocks(reading, writing)
            changed = _version(reading) != before
        except OSError as e:
            raise SnapshotError(f"cannot {way} {source} to {target}: {e.strerror}") from e
    if changed:
        raise SnapshotError(f"{source} was written while it was copied: the VM did not stand still")


def _version(descriptor: int) -> tuple[Any, ...]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _copy_blocks(reading: int, writing: int) -> None:
    size_bytes = os.fstat(reading).st_size
    os.ftruncate(writing, size_bytes)
    at = 0
    in_kernel = True
    while at < size_bytes:
        at, end = next_data(reading, at, size_bytes)
        while at < end:
            count = 0
            if in_kernel:
                try:
                    count = os.copy_file_range(reading, writing, min(_BLOCK_BYTES, end - at), at, at)
                except OSError as e:
                    if e.errno not in _CANNOT_COPY_IN_KERNEL:
                        raise
                    in_kernel = False
            if not in_kernel:
                os.lseek(writing, at, os.SEEK_SET)
                count = os.sendfile(writing, reading, at, min(_BLOCK_BYTES, end - at))
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter")
            at += count
