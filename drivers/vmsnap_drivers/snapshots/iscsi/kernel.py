"""Which LUN a block device of this host is, where Linux' own initiator (open-iscsi) has brought it here: from sysfs."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from vmsnap_drivers.snapshots.iscsi.address import LunAddress, parse

_SYS: Final = Path("/sys")
# …/hostH/sessionS/targetH:C:T/H:C:T:L/block/sdX, for the whole disk (drivers/scsi/scsi_transport_iscsi.c and
# scsi_scan.c of Linux 6.1); LUNs below 256 have the same number there as on the wire.
_DEVICE: Final = re.compile(r".*/(?P<session>session\d+)/target[\d:]+/\d+:\d+:\d+:(?P<lun>\d+)/block/sd[a-z]+")


def lun_at(address: str) -> LunAddress | None:
    """The LUN at an address of a disk, be that its own or a block device's; None where it is something else. Quick,
    never raises.
    """
    return parse(address) or (_lun_of(address) if address.startswith("/") else None)


def _lun_of(device: str) -> LunAddress | None:
    try:
        status = os.stat(device)  # noqa: PTH116 - an address, not a path of ours
        if not stat.S_ISBLK(status.st_mode):
            return None
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        found = _DEVICE.fullmatch(str((_SYS / "dev/block" / number).resolve(strict=True)))
        if found is None:
            return None
        session = found["session"]
        target = (_SYS / "class/iscsi_session" / session / "targetname").read_text().strip()
        connection = _SYS / "class/iscsi_connection" / f"connection{session.removeprefix('session')}:0"
        host, port = ((connection / f"persistent_{what}").read_text().strip() for what in ("address", "port"))
    except (OSError, ValueError):
        return None  # nothing is there, it is just going, or it is no device of an initiator
    return parse(f"iscsi://{f'[{host}]' if ':' in host else host}:{port}/{target}/{int(found['lun'])}")
