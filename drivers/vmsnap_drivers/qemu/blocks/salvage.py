"""What becomes of an overlay whose QEMU is gone: it may hold the newest data of the guest.

The disk was frozen at the instant and the overlay written after it. So, as long as nobody used the disk since, it is
older than the overlay; then the overlay is committed. If the disk is younger, somebody started the VM on it without the
overlay, and a commit would mix two histories: the overlay is kept, and a person must choose.

As with every disk that has a write cache, what is safe is what the guest flushed.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Final

from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.blocks import overlay
from vmsnap_drivers.qemu.blocks.image import QemuImg, sync
from vmsnap_drivers.qemu.blocks.overlay import OverlayNames

_COMMIT_SLACK_NS: Final = 5_000_000_000
"""A running commit writes to the disk, and sets the overlay's time every second."""


def salvage_overlay(image: QemuImg, disk: Disk, names: OverlayNames) -> None:
    """Bring what the overlay holds into the disk and remove it; no running QEMU knows it. Idempotent. Blocks.

    :raises SnapshotError: the disk was used since, or is in use, or it cannot be told: both files are as they were, and
        the message says what to do
    """
    found = _find(names)
    if found is None:
        return
    image.check_unused(found)
    if not image.holds_data(found):
        overlay.remove_files(names)
        return
    base = Path(disk.handle["file"])
    if found == Path(names.pivoting_file):
        if not image.is_same(found, base, disk.format):
            raise _keep(
                found,
                disk,
                "QEMU died in the moment in which the guest went back to its disk; the disk has all that was written "
                "before, and differs from the overlay in what was written in that moment",
                f"check the guest's file systems on {base}; if they are sound delete {found}, else commit it",
            )
    else:
        _check_unchanged(base, found, disk, _COMMIT_SLACK_NS if found == Path(names.committing_file) else 0)
        image.commit(found)
        sync(base)
    overlay.remove_files(names)
    sync(found.parent)


def _find(names: OverlayNames) -> Path | None:
    for name in (names.overlay_file, names.committing_file, names.pivoting_file):
        if name and Path(name).exists():
            return Path(name)
    return None


def _check_unchanged(base: Path, found: Path, disk: Disk, slack_ns: int) -> None:
    choice = f"to take the overlay's data: qemu-img commit {found}; to give them up: delete {found}"
    if not disk.handle["file"].startswith("/"):
        raise _keep(found, disk, "it is no file here, so it cannot be told whether it was written to since", choice)
    try:
        of_base, of_overlay = base.stat(), found.stat()
    except OSError as e:
        raise _keep(found, disk, f"{base} cannot be looked at: {e.strerror}", "bring it back, then run it again") from e
    if not stat.S_ISREG(of_base.st_mode):
        raise _keep(found, disk, f"{base} is no file, so it cannot be told whether it was written to since", choice)
    if of_base.st_mtime_ns > of_overlay.st_mtime_ns + slack_ns:
        raise _keep(found, disk, f"{base} was written to after it, so that both have data the other lacks", choice)


def _keep(found: Path, disk: Disk, why: str, cure: str) -> SnapshotError:
    return SnapshotError(
        f"the overlay {found} with the guest's last writes to disk {disk.device} is kept: {why}", cure=cure
    )
