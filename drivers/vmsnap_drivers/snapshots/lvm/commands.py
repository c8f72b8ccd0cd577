"""LVM's commands, as this mechanism gives them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import DriverUnavailable, SnapshotError, SnapshotInUse
from vmsnap_drivers.runner import Output, Runner, one_line
from vmsnap_drivers.snapshots.lvm.volumes import FIELDS, Volume, parse

INSTALL: Final = "install lvm2"
_AS_ROOT: Final = "run vmsnap as root"
_ASKING_SECONDS: Final = 60.0
_CHANGING_SECONDS: Final = 120.0
_CONTROL: Final = Path("/dev/mapper/control")
_ALWAYS: Final = "activation{monitoring=0}"
"""Have dmeventd leave alone what we make, and go on with what it monitors (lvm.conf(5)): `watch` sees to ours."""
_WITHOUT_UDEV: Final = "activation{udev_sync=0 udev_rules=0}"
"""Where no udev runs, nobody but LVM makes device nodes, and nobody answers it."""
_UDEV: Final = Path("/run/udev/control")
_IN_USE: Final = re.compile(r" in use| is used by ")
"""``lv_check_not_in_use`` in LVM's ``lib/activate/activate.c``."""
_CURE_OF_USE: Final = "end what has it open, then: vmsnap recover"


class Lvm:
    """LVM of the place where `runner` runs commands."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def volumes(self, groups: Sequence[str] = ()) -> list[Volume]:
        """All logical volumes, hidden ones too, of these groups or of all.

        :raises SnapshotError: a group is not there, or LVM cannot be asked
        :raises DriverUnavailable: LVM is not installed
        """
        options = ["--all", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", FIELDS]
        return parse(self._lvm(["lvs", *options, *groups], _ASKING_SECONDS, changes=False))

    def usable(self) -> bool:
        """Whether LVM is installed and may be used here."""
        return self.runner.find("lvm") is not None and self.runner.may_use(_CONTROL)

    def check_usable(self) -> None:
        """See that it is.

        :raises DriverUnavailable: it is not
        """
        if self.runner.find("lvm") is None:
            raise DriverUnavailable("the program lvm is not installed", cure=INSTALL)
        if not self.usable():
            if os.geteuid():
                raise DriverUnavailable("LVM is root's", cure=_AS_ROOT)
            raise DriverUnavailable("this kernel has no device mapper", cure="modprobe dm-mod")

    def status(self) -> str:
        """``dmsetup status`` of all devices: quick, and takes no lock.

        :raises SnapshotError: device mapper cannot be asked
        """
        return self._checked(["dmsetup", "status"], _ASKING_SECONDS)

    def version(self) -> str:
        """LVM's own version, such as ``2.03.16``."""
        text = self._lvm(["version"], _ASKING_SECONDS, changes=False)
        return next((line.split()[2] for line in text.splitlines() if "LVM version" in line), "unknown")

    def change(self, *arguments: str) -> None:
        """Give a command that changes something. Blocks.

        :raises SnapshotError: it failed
        """
        self._lvm(arguments, _CHANGING_SECONDS, changes=True)

    def change_in_pause(self, seconds: float, *arguments: str) -> None:
        """The same within so many seconds while a guest stands still, and without the copy of the metadata in
        /etc/lvm/backup, which the next change makes good.

        :raises SnapshotError: it failed, or another command held the group for too long
        """
        self._lvm(arguments, seconds, changes=True, more="backup{backup=0 archive=0}")

    def remove(self, volumes: Sequence[Volume]) -> None:
        """Remove volumes.

        :raises SnapshotInUse: they are in use; each is named
        :raises SnapshotError: some could not be, for another reason; each is named
        """
        if not volumes:
            return
        try:
            self.change("lvremove", "--force", *(volume.full_name for volume in volumes))
            return
        except SnapshotError:
            if len(volumes) == 1:
                raise
        # Where one of several cannot be removed, LVM 2.03.16 removes the others by half and says nothing.
        problems = []
        for volume in volumes:
            try:
                self.remove([volume])
            except SnapshotError as e:
                problems.append(e)
        if problems:
            kind = SnapshotInUse if all(isinstance(e, SnapshotInUse) for e in problems) else SnapshotError
            raise kind("; ".join(e.message for e in problems), cure=_CURE_OF_USE)

    def message_pool(self, group: str, pool: str, message: str) -> None:
        """Tell the thin pool's device something (``dm-thin``'s messages, the kernel's thin-provisioning.rst).

        :raises SnapshotError: it refused
        """
        self._checked(
            ["dmsetup", "message", f"{device_name(group, pool)}-tpool", "0", message], _CHANGING_SECONDS, changes=True
        )

    def holds_metadata(self, group: str, pool: str) -> bool:
        """Whether the pool holds a snapshot of its metadata for somebody to read.

        :raises SnapshotError: it cannot be asked
        """
        status = self._checked(["dmsetup", "status", f"{device_name(group, pool)}-tpool"], _ASKING_SECONDS)
        # begin, length, "thin-pool", transaction, metadata used, data used, held metadata root or "-" …
        words = status.split()
        return len(words) > 6 and words[2] == "thin-pool" and words[6] != "-"

    def has_external_origin(self, group: str, name: str) -> bool:
        """Whether an active thin volume reads from a volume outside of its pool what it has no blocks for (lvmthin(7),
        "external origin"). LVM says so of the volume that was made so, and not of its snapshots; the kernel of all.

        :raises SnapshotError: it is no active thin volume
        """
        table = self._checked(["dmsetup", "table", device_name(group, name)], _ASKING_SECONDS)
        # begin, length, "thin", pool, number in it, and an external origin, if any
        words = table.split()
        if words[2:3] != ["thin"]:
            raise SnapshotError(f"{group}/{name} is no active thin volume")
        return len(words) > 5

    def _lvm(self, arguments: Sequence[str], seconds: float, *, changes: bool, more: str = "") -> str:
        configuration = [_ALWAYS, more] if _UDEV.exists() else [_ALWAYS, more, _WITHOUT_UDEV]
        words = ["--config", " ".join(filter(None, configuration))]
        return self._checked(["lvm", *arguments[:1], *words, *arguments[1:]], seconds, changes=changes)

    def _checked(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> str:
        try:
            done = self.runner.run(argv, seconds, changes=changes)
        except DriverUnavailable as e:
            raise DriverUnavailable(e.message, cure=INSTALL) from e
        if done.status:
            raise _failure(argv, done)
        return done.stdout


def device_name(group: str, name: str) -> str:
    """The name that device mapper has for a volume: hyphens of each part are doubled (lvm(8))."""
    return f"{group.replace('-', '--')}-{name.replace('-', '--')}"


def _failure(argv: Sequence[str], done: Output) -> SnapshotError:
    said = one_line(done.stderr) or f"status {done.status}"
    if argv[1:2] == ["lvremove"] and _IN_USE.search(said):
        return SnapshotInUse(f"{' '.join(argv[:2])} failed: {said}", cure=_CURE_OF_USE)
    cure = f"LVM is root's: {_AS_ROOT}" if os.geteuid() else ""
    return SnapshotError(f"{' '.join(argv[:2])} failed: {said}", cure=cure)
