"""Sessions of Linux' own initiator, for the disks of duplicates whose originals have theirs so: logged in and out.

open-iscsi is told by ``iscsiadm`` (iscsiadm(8) of 2.1.8). Whom the session of the original says it is, CHAP's secret
with it, goes from sysfs, which shows that to CAP_SYS_ADMIN alone, into open-iscsi's own record of the new target: it
stands in no command line and in no file of ours.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from vmsnap.errors import DriverUnavailable, SnapshotError, SnapshotInUse
from vmsnap_drivers.runner import Runner, one_line
from vmsnap_drivers.snapshots.iscsi.address import LunAddress
from vmsnap_drivers.snapshots.iscsi.deviceusers import users_of
from vmsnap_drivers.snapshots.iscsi.kernel import all_sessions, session_of, sessions_with

# Of /usr/share/doc/open-iscsi/README.gz; the second is that of other distributions.
_RECORDS: Final = (Path("/etc/iscsi/nodes"), Path("/var/lib/iscsi/nodes"))
_ACCOUNT: Final = ("username", "password", "username_in", "password_in")
_OF_ACCOUNT: Final = tuple(f"node.session.auth.{name} " for name in ("authmethod", *_ACCOUNT))
_END_OF_RECORD: Final = "# END RECORD"
# include/iscsi_err.h of open-iscsi 2.1.8.
_SESSION_EXISTS: Final = 15
_NOTHING_FOUND: Final = 21
_LOGIN_FAILED: Final = (19, 24)
"""For good: the target does not show who it is, or does not let us in."""
_COMMAND_SECONDS: Final = 150.0
_DEVICE_SECONDS: Final = 60.0
_LOOK_EACH_SECONDS: Final = 0.02
_UDEV: Final = Path("/run/udev/control")
_BY_PATH: Final = Path("/dev/disk/by-path")


class KernelSessions:
    """The sessions of this host's initiator. `runner` runs its commands, on this host. All methods block."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def check(self) -> None:
        """See that they can be made.

        :raises DriverUnavailable: iscsiadm is not installed
        """
        if self._runner.find("iscsiadm") is None:
            raise DriverUnavailable(
                "the program iscsiadm is not installed, by which the duplicate's disk comes to this host",
                cure="install open-iscsi, or set the option duplicate_initiator=qemu",
            )

    def log_in(self, lun: LunAddress, like: str) -> Path:
        """Bring a LUN to this host as a block device. Idempotent.

        :param like: the device of the original, whose session's account and interface the new one has
        :returns: udev's lasting name of it or, where there is no udev, the kernel's
        :raises SnapshotError: the target does not let us in, or its disk does not come
        :raises DriverUnavailable: iscsiadm is not installed
        """
        original = session_of(like)
        if original is None:
            raise SnapshotError(f"{like} is no longer a disk of Linux' own initiator")
        try:
            interface = original.attribute("ifacename") or "default"
            account = {name: original.attribute(name) for name in _ACCOUNT}
        except OSError as e:
            raise SnapshotError(f"the session of {like} cannot be looked at: {e.strerror}", cure="run as root") from e
        where = _where(lun)
        self._tell([*where, "-I", interface, "-o", "new"], "note the target")
        if account["username"]:
            _give_account(lun, account)
        self._tell([*where, "--login"], f"log in to {lun}", _SESSION_EXISTS)
        return _await_device(lun)

    def log_out(self, lun: LunAddress) -> None:
        """Let a LUN go, and forget its target; idempotent. A session that has lost its target is let go of too.

        :raises SnapshotInUse: somebody uses the disk
        :raises SnapshotError: it was refused
        :raises DriverUnavailable: iscsiadm is not installed
        """
        sessions = list(sessions_with(lun))
        users = [user for session in sessions if (disk := session.disk(lun.lun)) for user in users_of(disk)]
        if users:
            raise SnapshotInUse(
                f"the LUN {lun} is in use by {', '.join(users)}", cure="end what uses it, then: vmsnap recover"
            )
        if sessions:
            self._tell([*_where(lun), "--logout"], f"log out of {lun}", _NOTHING_FOUND)
        if sessions or any(_records_of(lun)):
            self._tell([*_where(lun), "-o", "delete"], f"forget {lun}", _NOTHING_FOUND)

    def log_out_of(self, target: str, portals: Collection[str]) -> None:
        """`log_out` of LUN 1 of a target, where there is a session with it; at these portals alone, if any is named."""
        for lun in {lun for session in all_sessions() if (lun := session.lun(1)) and lun.target == target}:
            if not portals or lun.portal in portals:
                self.log_out(lun)

    def _tell(self, words: Sequence[str], what: str, *accepted: int) -> None:
        done = self._runner.run(["iscsiadm", *words], _COMMAND_SECONDS, changes=True)
        if done.status not in (0, *accepted):
            refused = done.status in _LOGIN_FAILED
            raise SnapshotError(
                f"Linux' initiator could not {what}: {one_line(done.stderr) or f'status {done.status}'}",
                cure="see whom the target admits, and that it has the same secrets of CHAP as this host's session"
                if refused
                else "see that iscsid runs, and that vmsnap is root",
            )


def _where(lun: LunAddress) -> list[str]:
    return ["-m", "node", "-T", lun.target, "-p", lun.portal]


def _records_of(lun: LunAddress) -> Iterator[Path]:
    """The files that open-iscsi has of a target: one each portal, or in a folder of that, one each interface."""
    for base in _RECORDS:
        yield from (path for path in (base / lun.target).rglob("*") if path.is_file())


def _give_account(lun: LunAddress, account: Mapping[str, str]) -> None:
    """Write an account into the records of a target of ours, which root alone may read.

    :raises SnapshotError: there are none, or they cannot be written
    """
    records = list(_records_of(lun))
    if not records:
        raise SnapshotError(f"open-iscsi has no record of {lun.target} in {' or '.join(map(str, _RECORDS))}")
    lines = ["node.session.auth.authmethod = CHAP"]
    lines += [f"node.session.auth.{name} = {value}" for name, value in account.items() if value]
    try:
        for record in records:
            kept = [line for line in record.read_text().splitlines() if not line.startswith(_OF_ACCOUNT)]
            end = kept.index(_END_OF_RECORD)
            record.write_text("\n".join([*kept[:end], *lines, *kept[end:], ""]))
    except (OSError, ValueError) as e:
        raise SnapshotError(f"open-iscsi's record of {lun.target} cannot be given its account: {e}") from e


def _await_device(lun: LunAddress) -> Path:
    deadline = time.monotonic() + _DEVICE_SECONDS
    while True:
        for session in sessions_with(lun):
            disk = Path("/dev", session.disk(lun.lun))
            # udev calls it by the portal's address, without the brackets of one of IPv6 (systemd's path_id).
            lasting = sorted(_BY_PATH.glob(f"*-iscsi-{lun.target}-lun-{lun.lun}")) if _UDEV.exists() else [disk]
            if disk.is_block_device() and (mine := [path for path in lasting if path.resolve() == disk]):
                return mine[0]
        if time.monotonic() > deadline:
            raise SnapshotError(
                f"the disk of {lun} has not come within {_DEVICE_SECONDS:g} s", cure="see dmesg, and that udev runs"
            )
        time.sleep(_LOOK_EACH_SECONDS)
