"""What sysfs shows of Linux' own initiator (open-iscsi): which LUN a block device of this host is, and its sessions."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap_drivers.snapshots.iscsi.address import LunAddress, parse

_SYS: Final = Path("/sys")
# …/hostH/sessionS/targetH:C:T/H:C:T:L/block/sdX, for the whole disk (drivers/scsi/scsi_transport_iscsi.c and
# scsi_scan.c of Linux 6.1); LUNs below 256 have the same number there as on the wire.
_DEVICE: Final = re.compile(r".*/(?P<session>session\d+)/target[\d:]+/\d+:\d+:\d+:(?P<lun>\d+)/block/sd[a-z]+")
_NOT_SET: Final = ("", "(null)", "<NULL>")
"""How drivers/scsi/libiscsi.c of Linux 6.1 prints what there is none of."""


@dataclass(frozen=True)
class Session:
    """One session, by the name that the kernel has for it, such as ``session3``."""

    name: str

    def attribute(self, name: str) -> str:
        """What it says of itself; empty where it does not.

        :raises OSError: the session is gone, or this is not shown to us
        """
        text = (_SYS / "class/iscsi_session" / self.name / name).read_text().strip()
        return "" if text in _NOT_SET else text

    def lun(self, number: int) -> LunAddress | None:
        """That LUN of its target, at the portal that it was told; None where the session is just going."""
        connection = _SYS / "class/iscsi_connection" / f"connection{self.name.removeprefix('session')}:0"
        try:
            host, port = ((connection / f"persistent_{what}").read_text().strip() for what in ("address", "port"))
            target = self.attribute("targetname")
        except OSError:
            return None
        return parse(f"iscsi://{f'[{host}]' if ':' in host else host}:{port}/{target}/{number}")

    def disk(self, number: int) -> str:
        """The kernel's name of the disk that is that LUN, such as ``sdb``; empty where it has not come."""
        found = (_SYS / "class/iscsi_session" / self.name).glob(f"device/target*/*:{number}/block/sd*")
        return next((path.name for path in found), "")


def lun_at(address: str) -> LunAddress | None:
    """The LUN at an address of a disk, be that its own or a block device's; None where it is something else. Quick,
    never raises.
    """
    if not address.startswith("/"):
        return parse(address)
    found = _find(address)
    return found[0].lun(found[1]) if found else None


def session_of(device: str) -> Session | None:
    """The session that has brought a block device; None where it is something else. Quick, never raises."""
    found = _find(device)
    return found[0] if found else None


def all_sessions() -> Iterator[Session]:
    """All sessions of this host. Quick."""
    yield from (Session(path.name) for path in sorted((_SYS / "class/iscsi_session").glob("session*")))


def sessions_with(lun: LunAddress) -> Iterator[Session]:
    """Those with the target of a LUN at its portal. Quick."""
    yield from (session for session in all_sessions() if session.lun(lun.lun) == lun)


def _find(device: str) -> tuple[Session, int] | None:
    try:
        status = os.stat(device)  # noqa: PTH116 - an address, not a path of ours
        if not stat.S_ISBLK(status.st_mode):
            return None
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        found = _DEVICE.fullmatch(str((_SYS / "dev/block" / number).resolve(strict=True)))
    except (OSError, ValueError):
        return None  # nothing is there
    return (Session(found["session"]), int(found["lun"])) if found else None
