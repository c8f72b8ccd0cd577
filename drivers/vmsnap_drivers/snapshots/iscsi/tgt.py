"""tgt, the iSCSI target in user space, told by ``tgtadm`` (tgtadm(8) of tgt 1.0.85).

All errors of tgtadm have the status 22: what it says is passed on. No secret is handled: accounts are known to tgtd,
and are bound by their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from vmsnap.errors import DriverUnavailable, SnapshotError
from vmsnap_drivers.runner import Runner, one_line

INSTALL: Final = "install tgt"
CONTROLLER: Final = 0
"""The LUN that every target has, which is no disk."""
_SECONDS: Final = 60.0
_TARGET: Final = re.compile(r"Target (\d+): (\S+)")
_TRIES: Final = 5
_NOBODY: Final = "tgt daemon"
_EXISTS: Final = "this target already exists"


class NotRunning(SnapshotError):
    """No tgtd answers there: nothing is exported."""


@dataclass(frozen=True)
class Lun:
    """One LUN of a target; `path` is its backing store."""

    number: int
    path: str = ""
    read_only: bool = False


@dataclass
class Target:
    """One target. `sessions` are the names of the initiators that are connected, `accounts` those of CHAP with which
    they may be, `outgoing` the one by which the target shows who it is.
    """

    tid: int
    name: str
    luns: list[Lun] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)
    outgoing: list[str] = field(default_factory=list)
    access: list[str] = field(default_factory=list)

    @property
    def disks(self) -> list[Lun]:
        """Its LUNs that are disks."""
        return [lun for lun in self.luns if lun.number != CONTROLLER]


class Tgt:
    """The tgtd with that control port, where `runner` runs commands."""

    def __init__(self, runner: Runner, control_port: int) -> None:
        self._runner = runner
        self._control_port = control_port

    def targets(self) -> list[Target]:
        """All targets.

        :raises NotRunning: no tgtd answers
        :raises DriverUnavailable: tgtadm is not installed
        :raises SnapshotError: it cannot be asked
        """
        return parse(self._tgtadm("target", "show"))

    def portals(self) -> list[str]:
        """Where it listens, such as ``127.0.0.1:3260``. Raises as `targets` does."""
        found = re.findall(r"Portal: (\S+?)(?:,\d+)?$", self._tgtadm("portal", "show"), re.MULTILINE)
        return [str(portal) for portal in found]

    def find(self, name: str) -> Target | None:
        """The target of that name. Raises as `targets` does."""
        return next((target for target in self.targets() if target.name == name), None)

    def export(self, name: str, path: str, like: Target, initiators: Sequence[str], *, read_only: bool) -> None:
        """Make a target with one LUN, number 1, that the `initiators` (addresses, or names that begin with ``iqn.``)
        may use with the accounts of the target `like`. Nobody can before all is as it is to be.

        :raises SnapshotError: there is such a target, or tgtd refused
        """
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
        """Remove a target. With `force` whoever is connected is cut off.

        :raises SnapshotError: it is in use, or tgtd refused
        """
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
        raise taken(name)

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
        if _NOBODY in said:
            raise NotRunning("no tgtd answers", cure="start tgtd, and see that vmsnap may use its socket (root's)")
        raise SnapshotError(f"tgtadm could not {operation} {mode} {tid}: {said}".replace("  ", " "))


def taken(name: str) -> SnapshotError:
    """What is said where a name is somebody's already."""
    return SnapshotError(
        f"there is an iSCSI target {name} already, which is left alone",
        cure="remove it if nobody needs it, or see: vmsnap strays",
    )


def parse(text: str) -> list[Target]:
    """The targets in what ``tgtadm --mode target --op show`` prints."""
    found: list[Target] = []
    section = ""
    for line in map(str.strip, text.splitlines()):
        begin = _TARGET.fullmatch(line)
        if begin:
            found.append(Target(int(begin[1]), begin[2]))
        elif line.endswith(" information:"):
            section = line.removesuffix(" information:")
        elif found and line:
            _take(found[-1], section, line)
    return found


def _take(target: Target, section: str, line: str) -> None:
    key, _, value = line.partition(": ")
    if section == "LUN":
        if key == "LUN":
            target.luns.append(Lun(int(value)))
        elif target.luns and key == "Backing store path":
            target.luns[-1] = Lun(target.luns[-1].number, value, target.luns[-1].read_only)
        elif target.luns and key == "Readonly":
            target.luns[-1] = Lun(target.luns[-1].number, target.luns[-1].path, value == "Yes")
    elif section == "I_T nexus" and key == "Initiator":
        target.sessions.append(value.partition(" alias: ")[0])
    elif section == "Account":
        name = line.removesuffix(" (outgoing)")
        (target.accounts if name == line else target.outgoing).append(name)
    elif section == "ACL":
        target.access.append(line)
