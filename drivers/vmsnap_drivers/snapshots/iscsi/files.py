"""Backing stores that are files on a file system that can reflink."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import ClassVar, Final

from vmsnap.errors import SnapshotError
from vmsnap_drivers.runner import one_line
from vmsnap_drivers.snapshots.iscsi.stores import Origin, Owned, Stores

_CAN_REFLINK: Final = frozenset(["xfs", "btrfs", "bcachefs", "ocfs2"])
"""As ``stat -f`` names them (coreutils' stat.c)."""
# "~" stands in no tag and no name, so that the parts cannot be mistaken for each other
_OURS: Final = re.compile(r"(?P<tag>vmsnap-[A-Za-z0-9._-]+)~\d+~(?:[A-Za-z0-9._-]+~)?(?P<kind>snapshot|clone)\.iscsi")


class Files(Stores):
    """Reflinks beside the file, readable by root alone: milliseconds, whatever the size."""

    kind: ClassVar[str] = "file"

    def look(self, path: str) -> Origin | None:
        """See `Stores.look`."""
        done = self._ask(["stat", "--dereference", "--format=%F|%s", "--", path])
        if done.status:
            raise SnapshotError(f"the backing store {path} cannot be looked at: {one_line(done.stderr)}")
        what, _, size = done.stdout.strip().partition("|")
        if what == "block special file":
            return None
        if what not in ("regular file", "regular empty file"):
            raise SnapshotError(f"{path} is a {what}")
        folder = str(PurePosixPath(path).parent)
        system = self._run(["stat", "--file-system", "--format=%T", "--", folder]).strip()
        if system not in _CAN_REFLINK:
            raise SnapshotError(
                f"{path} lies on {system}, where a file cannot be snapshotted",
                cure="use XFS, btrfs or a thin volume, or choose --mechanism DISK=qcow2",
            )
        return Origin(self.kind, path, int(size))

    def name(self, tag: str, index: int, clone: str = "") -> str:
        """See `Stores.name`."""
        return f"{tag}~{index}~{clone}~clone.iscsi" if clone else f"{tag}~{index}~snapshot.iscsi"

    def exists(self, path: str) -> bool:
        """See `Stores.exists`."""
        return self._ask(["test", "-e", path]).status == 0

    def prepare(self, origin: str, path: str, tag: str) -> None:
        """Make the file, empty, and bring to the disk what a reflink would have to wait for. One is tried, and undone:
        an XFS of before 2018, or a file that btrfs does not copy on write, cannot have any.

        :raises SnapshotError: the file cannot be reflinked
        """
        self._make(path)
        self._run(["sync", "--data", "--", origin])
        self._run(["cp", "--reflink=always", "--", origin, path], changes=True)
        self._make(path)

    def snapshot(self, origin: str, path: str, tag: str, seconds: float) -> None:
        """See `Stores.snapshot`."""
        self._run(["cp", "--reflink=always", "--", origin, path], seconds, changes=True)

    def clone(self, source: str, path: str, tag: str) -> None:
        """See `Stores.clone`."""
        self._make(path)
        self._run(["cp", "--reflink=always", "--", source, path], changes=True)

    def remove(self, path: str, tag: str) -> None:
        """See `Stores.remove`. Its name is what makes it ours."""
        found = _OURS.fullmatch(PurePosixPath(path).name)
        if found is None or found["tag"] != tag:
            raise SnapshotError(f"{path} is not named as ours are")
        self._run(["rm", "--force", "--", path], changes=True)

    def owned(self, origins: Iterable[str]) -> list[Owned]:
        """See `Stores.owned`."""
        folders = sorted({str(PurePosixPath(origin).parent) for origin in origins})
        if not folders:
            return []
        found = []
        for line in self._ask(
            ["find", "-H", *folders, "-maxdepth", "1", "-type", "f", "-name", "vmsnap-*"]
        ).stdout.split("\n"):
            parts = _OURS.fullmatch(PurePosixPath(line).name)
            if parts:
                found.append(Owned(parts["kind"], line, parts["tag"]))
        return found

    def _make(self, path: str) -> None:
        self._run(["install", "--mode=600", "/dev/null", path], changes=True)
