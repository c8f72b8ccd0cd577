"""The mechanism: one read-only snapshot of each subvolume in which a disk lies."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmsnap.errors import SnapshotError
from vmsnap.model import ClonePlan, Disk, DiskSnapshot, Finding, Moment, OwnedResource, SnapshotPlan, Window, check_name
from vmsnap.roles import DriverContext, Option, Program, SnapshotMechanism, seconds, with_defaults
from vmsnap.roles.filereader import FileReader
from vmsnap_btrfs.subvolumes import btrfs, is_subvolume, subvolume_of

TIMEOUT = seconds()
_SLOWEST_COPY_BYTES_PER_SECOND = 10 << 20
"""What copies more slowly than this is taken to hang."""
_TAG = re.compile(r"vmsnap-[A-Za-z0-9._-]+")
# "~" stands in no tag and in no name, so that the parts cannot be mistaken for each other
_OURS = re.compile(r"(?P<tag>vmsnap-[A-Za-z0-9._-]+)~\d+~(?:[A-Za-z0-9._-]+~)?(?P<kind>snapshot|clone)")


class BtrfsMechanism(SnapshotMechanism):
    """Snapshots of disk images in btrfs subvolumes: all disks of one subvolume at the very same instant.

    A snapshot lies in the root of its subvolume, under the tag of its backup. Clones are reflinks where the duplicate's
    folder lies on the same file system, else copies.
    """

    name = "btrfs"
    options = (Option("timeout", "after how long btrfs is given up", "60", type=TIMEOUT),)
    needs = (Program(("btrfs",), "apt install btrfs-progs"),)
    clones = True

    def __init__(self, context: DriverContext, options: Mapping[str, str]) -> None:
        """Remember context and checked options; no I/O."""
        super().__init__(context, options)
        self._timeout_seconds = TIMEOUT.read(with_defaults(self.options, options)["timeout"])

    def handles(self, disk: Disk) -> bool:
        """Raw files for which their hypervisor vouches, in a subvolume."""
        if disk.format != "raw" or disk.handle.get("plain_file") != "yes" or not disk.address.startswith("/"):
            return False
        try:
            if not stat.S_ISREG(os.stat(disk.address).st_mode):  # noqa: PTH116 - an address, not a path of ours
                return False
        except (OSError, ValueError):
            return False
        return subvolume_of(Path(disk.address)) is not None

    def plan(self, vm: str, disks: Sequence[Disk], tag: str, window: Window) -> SnapshotPlan:
        """Name a snapshot for each subvolume that has a disk; see the role."""
        if not _TAG.fullmatch(tag):
            raise SnapshotError(f"{tag!r} is no tag")
        sources: list[str] = []
        files = []
        for disk in disks:
            source = subvolume_of(Path(disk.address)) if self.handles(disk) else None
            if source is None:
                raise SnapshotError(f"{disk.device} at {disk.address} is no raw image in a btrfs subvolume")
            if str(source) not in sources:
                sources.append(str(source))
            snapshot = source / f"{tag}~{sources.index(str(source))}~snapshot"
            files.append(str(snapshot / Path(disk.address).resolve().relative_to(source)))
        snapshots = [f"{source}/{tag}~{index}~snapshot" for index, source in enumerate(sources)]
        data = {"sources": sources, "snapshots": snapshots, "files": files}
        return SnapshotPlan(self.name, tag, vm, tuple(disks), window, data)

    def prepare(self, plan: SnapshotPlan) -> None:
        """Write down where to look for strays, and write out what is dirty, so that the pause has little to write."""
        for snapshot in _snapshots(plan):
            self._note_folder(snapshot.parent)
            btrfs("filesystem", "sync", str(snapshot.parent), timeout_seconds=self._timeout_seconds)

    def snapshot(self, plan: SnapshotPlan) -> tuple[DiskSnapshot, ...]:
        """Snapshot each subvolume; see the role."""
        instants = []
        for source, snapshot in zip(plan.data["sources"], _snapshots(plan), strict=True):
            instants.append(Moment.now("snapshot"))
            btrfs("subvolume", "snapshot", "-r", source, str(snapshot), timeout_seconds=self._timeout_seconds)
        taken = []
        for disk, file in zip(plan.disks, plan.data["files"], strict=True):
            index = next(index for index, snapshot in enumerate(_snapshots(plan)) if snapshot in Path(file).parents)
            taken.append(DiskSnapshot(plan, disk, instants[index], {"file": file}))
        return tuple(taken)

    def reader(self, snapshot: DiskSnapshot) -> FileReader:
        """Open the image in the snapshot; see the role."""
        return FileReader(_file_of(snapshot), snapshot.disk.size_bytes)

    def delete(self, plan: SnapshotPlan) -> None:
        """Remove the plan's subvolumes; see the role."""
        failed = []
        for snapshot in _snapshots(plan):
            try:
                self._remove(snapshot)
            except SnapshotError as e:
                failed.append(e.message)
        if failed:
            raise SnapshotError("; ".join(failed))

    def _remove(self, snapshot: Path) -> None:
        if is_subvolume(snapshot):
            btrfs("subvolume", "delete", str(snapshot), timeout_seconds=self._timeout_seconds)
        elif snapshot.exists():
            raise SnapshotError(f"{snapshot} is no subvolume and not ours", cure="look at it, and remove it by hand")

    def list_owned(self) -> Sequence[OwnedResource]:
        """Snapshots and clones in every folder that was ever used, by their names."""
        owned = []
        for folder in sorted({Path(note.read_text()) for note in self._notes().glob("*.folder")}):
            for path in sorted(folder.glob("vmsnap-*")):
                found = _OURS.fullmatch(path.name)
                if found and (found["kind"] == "clone" or is_subvolume(path)):
                    owned.append(OwnedResource(found["kind"], str(path), found["tag"], self.name))
        return owned

    def remove_owned(self, owned: OwnedResource) -> None:
        """Remove the stray; see the role."""
        if owned not in self.list_owned():
            return
        if owned.kind == "snapshot":
            self._remove(Path(owned.name))
        else:
            _unlink(Path(owned.name))

    def _notes(self) -> Path:
        return self.context.state_dir / self.name

    def _note_of(self, folder: Path) -> Path:
        return self._notes() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.folder"

    def _note_folder(self, folder: Path) -> None:
        self._notes().mkdir(mode=0o700, parents=True, exist_ok=True)
        note = self._note_of(folder)
        if not note.exists():
            partial = note.with_suffix(f".{os.getpid()}")
            partial.write_text(str(folder))
            partial.rename(note)

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        try:
            btrfs("--version", timeout_seconds=self._timeout_seconds)
        except SnapshotError as e:
            return [Finding("command btrfs", "missing", e.message, e.cure)]
        if os.geteuid() != 0:
            cure = "mount with user_subvol_rm_allowed, or run as root"
            return [Finding("rights", "note", "only root may delete subvolumes everywhere", cure)]
        return [Finding("command btrfs", "ok", "is there")]

    def plan_clone(self, snapshot: DiskSnapshot, name: str, folder: Path, *, lasting: bool) -> ClonePlan:
        """A file in `folder`, which leans on nothing; see the role."""
        source = _file_of(snapshot)
        index = snapshot.plan.data["files"].index(str(source))
        path = folder.absolute() / f"{snapshot.plan.tag}~{index}~{check_name(name, 'duplicate name')}~clone"
        try:
            needed = 0 if _one_file_system(source, folder) else source.stat().st_blocks * 512
            room = os.statvfs(folder)
        except OSError as e:
            raise SnapshotError(f"{source} cannot be cloned into {folder}: {e.strerror}") from e
        if needed > room.f_bavail * room.f_frsize:
            raise SnapshotError(f"no room for a clone in {folder}: it needs {needed} bytes", cure="make room there")
        device = snapshot.disk.device
        return ClonePlan(self.name, snapshot.plan, device, name, folder.absolute(), lasting, {"file": str(path)})

    def clone(self, plan: ClonePlan, snapshot: DiskSnapshot) -> Disk:
        """Copy the image out of the snapshot, by reflink where it can be; see the role."""
        source, path = _file_of(snapshot), _file_of_clone(plan)
        self._note_folder(path.parent)
        argv = ["cp", "--reflink=auto", "--sparse=always", "--no-clobber", "--", str(source), str(path)]
        try:
            bound = self._timeout_seconds + source.stat().st_blocks * 512 / _SLOWEST_COPY_BYTES_PER_SECOND
            subprocess.run(argv, check=True, capture_output=True, text=True, timeout=bound)
            path.chmod(0o600)
        except (OSError, subprocess.SubprocessError) as e:
            raise SnapshotError(f"cannot copy {source} to {path}: {getattr(e, 'stderr', None) or e}") from e
        return Disk(snapshot.disk.device, str(path), snapshot.disk.size_bytes, handle={"plain_file": "yes"})

    def delete_clone(self, plan: ClonePlan) -> None:
        """Remove the clone's file; see the role."""
        path = _file_of_clone(plan)
        _unlink(path)
        # every duplicate has a folder of its own: the notes must not pile up
        if not any(path.parent.glob("vmsnap-*")):
            self._note_of(path.parent).unlink(missing_ok=True)

    def clone_reader(self, plan: ClonePlan, disk: Disk) -> FileReader:
        """Open the clone's file; see the role."""
        return FileReader(_file_of_clone(plan), disk.size_bytes, "the clone")


def _snapshots(plan: SnapshotPlan) -> list[Path]:
    """The plan's snapshots; refuses a plan that names others than ours, since they will be deleted."""
    paths = [Path(name) for name in plan.data["snapshots"]]
    for index, path in enumerate(paths):
        if path.name != f"{plan.tag}~{index}~snapshot" or not _TAG.fullmatch(plan.tag) or not path.is_absolute():
            raise SnapshotError(f"the plan {plan.tag!r} names {path}, which is no snapshot of it")
    return paths


def _file_of(snapshot: DiskSnapshot) -> Path:
    path = Path(snapshot.data["file"])
    if str(path) not in snapshot.plan.data["files"]:
        raise SnapshotError(f"{path} does not stand in the plan {snapshot.plan.tag!r}")
    return path


def _file_of_clone(plan: ClonePlan) -> Path:
    """The clone's file; refuses a plan that names another than ours, since it will be deleted."""
    path = Path(plan.data["file"])
    found = _OURS.fullmatch(path.name)
    if found is None or found["kind"] != "clone" or found["tag"] != plan.snapshot.tag or path.parent != plan.folder:
        raise SnapshotError(f"the plan of a clone for {plan.name!r} names {path}, which is no clone of it")
    return path


def _one_file_system(file: Path, folder: Path) -> bool:
    """Subvolumes have device numbers of their own: what tells is that both are btrfs below one mount."""
    one, other = subvolume_of(file), subvolume_of(folder / ".")
    return one is not None and other is not None and _mount_of(one) == _mount_of(other)


def _mount_of(path: Path) -> Path:
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return
    except OSError as e:
        raise SnapshotError(f"{path} could not be removed: {e.strerror}") from e
