"""tgt, the iSCSI target in user space, told by ``tgtadm`` (tgtadm(8) of tgt 1.0.85).

All errors of tgtadm have the status 22: what it says is passed on. No secret is handled: accounts are known to tgtd,
and are bound by their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap_drivers.runner import Runner, one_line
from vmsnap_drivers.snapshots.iscsi.address import LunAddress, is_iqn, own_address_towards
from vmsnap_drivers.snapshots.iscsi.targets import Lun, NotAllowed, NotRunning, Taken, Target, Targets

INSTALL: Final = "install tgt"
_CONTROLLER: Final = 0
"""The LUN that every target has, which is no disk."""
_SECONDS: Final = 60.0
_TARGET: Final = re.compile(r"Target (\d+): (\S+)")
_SOCKETS: Final = Path("/var/run/tgtd")
_TRIES: Final = 5
_NOBODY: Final = re.compile(
    r"(can't connect to|failed to send request hdr to) tgt daemon,"
    r" (Connection refused|No such file or directory|Transport endpoint is not connected)"
)
"""It could not connect: tgtadm 1.0.85 does not see that, and is told so when it writes (``ipc_mgmt_connect`` in
``usr/tgtadm.c``). Nobody listens, or it may not use the socket.
"""
_LISTENING: Final = 0x10000
"""In the flags of ``/proc/net/unix`` (``__SO_ACCEPTCON``)."""
_NO_ANSWER: Final = "tgt daemon"
_EXISTS: Final = "this target already exists"


class Tgt(Targets):
    """The tgtd with that control port, where `runner` runs commands. It knows initiators by their addresses and by
    their names.
    """

    name: ClassVar[str] = "tgt"
    label: ClassVar[str] = "tgtd"
    cure_of_listening: ClassVar[str] = "start it with --iscsi portal=ADDRESS:PORT, an address of the storage network"

    def __init__(self, runner: Runner, control_port: int) -> None:
        self._runner = runner
        self._control_port = control_port
        self._socket = _SOCKETS / f"socket.{control_port}"

    def is_on_this_host(self) -> bool:
        """See `Targets.is_on_this_host`."""
        return os.access(self._socket, os.F_OK)

    def refusal(self) -> NotAllowed | None:
        """See `Targets.refusal`."""
        closed = self.is_on_this_host() and not os.access(self._socket, os.W_OK)
        return NotAllowed(self.label, str(self._socket)) if closed else None

    def targets(self) -> list[Target]:
        """See `Targets.targets`."""
        return parse(self._tgtadm("target", "show"))

    def portals(self) -> list[str]:
        """See `Targets.portals`."""
        found = re.findall(r"Portal: (\S+?)(?:,\d+)?$", self._tgtadm("portal", "show"), re.MULTILINE)
        return [str(portal) for portal in found]

    def portals_of(self, target: Target) -> list[str]:
        """See `Targets.portals_of`: all targets of a tgtd are reached where it listens."""
        return self.portals()

    def admitted(self, lun: LunAddress, like: Target, duplicate: str) -> Sequence[str]:
        """See `Targets.admitted`: by the address that the portal sees."""
        return [own_address_towards(lun)]

    def check_initiator(self, initiator: str) -> None:
        """See `Targets.check_initiator`: an address, or a name."""
        if not is_iqn(initiator) and not initiator.replace(".", "").replace(":", "").isalnum():
            raise UsageError(f"initiators: {initiator!r} is neither an address nor a name")
        if initiator.upper() == "ALL":
            raise UsageError("initiators: everybody is nobody that may use a snapshot", cure="name addresses")

    def export(self, name: str, path: str, like: Target, initiators: Sequence[str], *, read_only: bool) -> None:
        """See `Targets.export`. Whoever is bound at the end is admitted."""
        tid = self._make(name)
        self._tgtadm("logicalunit", "new", tid, "--lun", "1", "--backing-store", path)
        if read_only:
            self._tgtadm("logicalunit", "update", tid, "--lun", "1", "--params", "readonly=1")
        for account in like.accounts:
            self._tgtadm("account", "bind", tid, "--user", account)
        for account in like.outgoing:
            self._tgtadm("account", "bind", tid, "--user", account, "--outgoing")
        for initiator in initiators:
            kind = "--initiator-name" if initiator.startswith("iqn.") else "--initiator-address"
            self._tgtadm("target", "bind", tid, kind, initiator)

    def delete(self, target: Target, *, force: bool) -> None:
        """See `Targets.delete`."""
        self._tgtadm("target", "delete", str(target.tid), *(["--force"] if force else []))

    def _make(self, name: str) -> str:
        for _ in range(_TRIES):
            targets = self.targets()
            if any(target.name == name for target in targets):
                break
            tid = str(max((target.tid for target in targets), default=0) + 1)
            try:
                self._tgtadm("target", "new", tid, "--targetname", name)
            except SnapshotError as e:
                # Somebody else may have taken the number in between.
                if _EXISTS not in e.message:
                    raise
            else:
                return tid
        raise Taken(name)

    def _tgtadm(self, mode: str, operation: str, tid: str = "", *more: str) -> str:
        argv = [
            "tgtadm",
            "--control-port",
            str(self._control_port),
            "--lld",
            "iscsi",
            "--mode",
            mode,
            "--op",
            operation,
        ]
        argv += ["--tid", tid] if tid else []
        try:
            done = self._runner.run([*argv, *more], _SECONDS, changes=operation != "show")
        except DriverUnavailable as e:
            raise DriverUnavailable(e.message, cure=INSTALL if "tgtadm" in e.message else "install it there") from e
        if not done.status:
            return done.stdout
        said = one_line(done.stderr).removeprefix("tgtadm: ") or f"status {done.status}"
        if _NOBODY.search(said):
            if not self._listens():
                raise NotRunning("no tgtd answers", cure="start tgtd, and see that vmsnap may use its socket (root's)")
            # Without rights one is told the same. What it serves is there all the same.
            said = f"tgtd listens and does not let it in: {said}"
        cure = "see that vmsnap may use tgtd's socket (root's)" if _NO_ANSWER in said else ""
        raise SnapshotError(f"tgtadm could not {operation} {mode} {tid}: {said}".replace("  ", " "), cure=cure)

    def _listens(self) -> bool:
        """Whether a tgtd listens, or that cannot be seen. Linux tells everybody."""
        done = self._runner.run(["dd", "if=/proc/net/unix", "status=none"], _SECONDS, changes=False)
        name = f"/run/tgtd/socket.{self._control_port}"
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
        listening = [row[7] for row in rows if len(row) == 8 and int(row[3], 16) & _LISTENING]
        return bool(done.status) or any(path.removeprefix("/var") == name for path in listening)


def parse(text: str) -> list[Target]:
    """The targets in what ``tgtadm --mode target --op show`` prints."""
    found: list[Target] = []
    section = ""
    for line in map(str.strip, text.splitlines()):
        begin = _TARGET.fullmatch(line)
        if begin:
            found.append(Target(begin[2], int(begin[1])))
        elif line.endswith(" information:"):
            section = line.removesuffix(" information:")
        elif found and line:
            _take(found[-1], section, line)
    for target in found:
        target.disks = [lun for lun in target.disks if lun.number != _CONTROLLER]
    return found


def _take(target: Target, section: str, line: str) -> None:
    key, _, value = line.partition(": ")
    if section == "LUN":
        if key == "LUN":
            target.disks.append(Lun(int(value)))
        elif target.disks and key == "Backing store path":
            target.disks[-1] = Lun(target.disks[-1].number, value, target.disks[-1].read_only)
        elif target.disks and key == "Readonly":
            target.disks[-1] = Lun(target.disks[-1].number, target.disks[-1].path, value == "Yes")
    elif section == "I_T nexus" and key == "Initiator":
        target.sessions.append(value.partition(" alias: ")[0])
    elif section == "Account":
        name = line.removesuffix(" (outgoing)")
        (target.accounts if name == line else target.outgoing).append(name)
    elif section == "ACL":
        target.access.append(line)
