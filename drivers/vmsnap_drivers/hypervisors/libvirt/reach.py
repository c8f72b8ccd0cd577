"""Sees to it that QEMU's own user can reach the disks of a loaded domain, and overlays over disks that are no files.

libvirt's QEMU runs as a user of its own, which opens the disks; libvirt gives it the files, not the way to them.
vmsnap's folders are 0700. So this user, and nobody else, is let *through* (``x``, not ``r``) those folders of vmsnap's
on the way to a disk, by an ACL: acl(5), in the form of the extended attribute ``system.posix_acl_access``
(``include/uapi/linux/posix_acl_xattr.h``).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import HypervisorError

_ATTRIBUTE: Final = "system.posix_acl_access"
_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY: Final = 0xFFFFFFFF
_SEARCH: Final = 1


def qemu_user(capabilities: str) -> int | None:
    """Whom QEMU runs as, by libvirt's capabilities (``host/secmodel``); None where it is libvirt's own user."""
    for model in ET.fromstring(capabilities).iterfind("host/secmodel"):
        if model.findtext("model") != "dac":
            continue
        for label in model.iterfind("baselabel"):
            if label.get("type") in ("qemu", "kvm") and (found := re.match(r"\+?(\d+)", label.text or "")):
                return int(found[1])
    return None


def let_through(user: int, addresses: Sequence[str], ours: Sequence[Path]) -> None:
    """Let the user through to each file of `addresses`; only what lies in folders of `ours` is changed. Idempotent.

    :raises HypervisorError: the user does not get there
    """
    for address in addresses:
        if not address.startswith("/") or address.startswith("/dev/"):
            continue
        for folder in reversed(Path(address).absolute().parents):
            if _may_search(user, folder):
                continue
            if not is_within(folder, ours):
                raise HypervisorError(
                    f"QEMU's user {user} cannot get through {folder} to the disk {address}",
                    cure="choose a folder that is open to it, such as one in /var/lib/libvirt/images",
                )
            _allow(user, folder)


def is_within(folder: Path, ours: Sequence[Path]) -> bool:
    """Whether a folder is one of ours, or lies in one."""
    return any(folder == place or place in folder.parents for place in ours)


def _may_search(user: int, folder: Path) -> bool:
    """Whether the mode or an ACL lets the user through; groups are not looked at."""
    try:
        found = folder.stat()
    except OSError as e:
        raise HypervisorError(f"{folder} cannot be looked at: {e.strerror}") from e
    if user == 0 or found.st_mode & stat.S_IXOTH:
        return True
    if found.st_uid == user:
        return bool(found.st_mode & stat.S_IXUSR)
    return any(tag == _USER and whom == user and bits & _SEARCH for tag, bits, whom in _entries(folder, found.st_mode))


def _entries(folder: Path, mode: int) -> list[tuple[int, int, int]]:
    try:
        raw = os.getxattr(folder, _ATTRIBUTE)
    except OSError as e:
        if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise HypervisorError(f"the permissions of {folder} cannot be read: {e.strerror}") from e
        shifts = ((_USER_OBJ, 6), (_GROUP_OBJ, 3), (_OTHER, 0))
        return [(tag, mode >> shift & 7, _NOBODY) for tag, shift in shifts]
    return list(_ENTRY.iter_unpack(raw[len(_VERSION) :]))


def _allow(user: int, folder: Path) -> None:
    entries = [entry for entry in _entries(folder, folder.stat().st_mode) if entry[0] != _MASK]
    entries = [entry for entry in entries if (entry[0], entry[2]) != (_USER, user)] + [(_USER, _SEARCH, user)]
    granted = 0
    for tag, bits, _ in entries:
        if tag in (_USER, _GROUP_OBJ, _GROUP):
            granted |= bits
    entries.append((_MASK, granted, _NOBODY))
    raw = _VERSION + b"".join(_ENTRY.pack(*entry) for entry in sorted(entries, key=lambda entry: (entry[0], entry[2])))
    try:
        os.setxattr(folder, _ATTRIBUTE, raw)
    except OSError as e:
        raise HypervisorError(
            f"QEMU's user {user} cannot be let through {folder}: {e.strerror}",
            cure="choose a folder that is open to it, such as one in /var/lib/libvirt/images",
        ) from e
