"""Disks that lie on the file system of another host, and what that means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from vmsnap.model import Disk
from vmsnap_drivers.qemu.peer import file_system_of

_OF_OTHER_HOSTS: Final = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "afs", "ocfs2", "gfs2"]
)
"""Types as ``/proc/self/mountinfo`` has them."""


def on_network(kind: str) -> bool:
    """Whether a file system of this type is another host's, or shared with others."""
    return kind in _OF_OTHER_HOSTS


def notes_of_disks(disks: Iterable[Disk]) -> Iterator[str]:
    """One line for each disk on such a file system, of those that the guest writes."""
    for disk in disks:
        if disk.read_only or not disk.address.startswith("/") or disk.address.startswith("/dev/"):
            continue
        if on_network(kind := file_system_of(Path(disk.address))):
            yield note(disk, kind)


def note(disk: Disk, kind: str) -> str:
    """What is to be known of it."""
    return (
        f"{disk.device} lies on {kind}: while a backup lasts, what the guest overwrites is copied there first,"
        " and the guest waits for it; root of this host must be allowed to make files beside it"
    )
