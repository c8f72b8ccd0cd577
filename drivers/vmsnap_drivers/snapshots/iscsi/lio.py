"""LIO, the iSCSI target in Linux, told by a program that runs where it serves (`lio_program`).

LIO itself keeps nothing when its machine ends, and vmsnap does not write its ``saveconfig.json``: what is exported
lives as long as that kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, ClassVar, Final

from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap_drivers.runner import Runner, one_line
from vmsnap_drivers.snapshots.iscsi.address import LunAddress, is_iqn
from vmsnap_drivers.snapshots.iscsi.targets import Lun, NotAllowed, NotRunning, Taken, Target, Targets

_CONFIGFS: Final = "/sys/kernel/config/target/iscsi"
QEMU: Final = "iqn.2008-11.org.linux-kvm"
"""What QEMU's initiator calls itself (``block/iscsi.c``, 7.2 and 10.0): its programs so, a VM with its UUID behind a
colon or, where it has none, its name.
"""
_SECONDS: Final = 120.0
_PROGRAM: Final = "lio_program.py"


class Lio(Targets):
    """The LIO of the machine where `runner` runs commands. It knows initiators by their names alone.

    :ivar user: the CHAP account by which vmsnap reads, where the origin's targets have several
    """

    name: ClassVar[str] = "lio"
    label: ClassVar[str] = "LIO"
    # target_core_iblock.c submits bios.
    bypasses_cache: ClassVar[bool] = True
    cure_of_listening: ClassVar[str] = "give the target a portal at an address of the storage network instead of that"

    def __init__(self, runner: Runner, user: str = "") -> None:
        self._runner = runner
        self._user = user

    def is_on_this_host(self) -> bool:
        """See `Targets.is_on_this_host`."""
        return os.access(_CONFIGFS, os.F_OK)

    def refusal(self) -> NotAllowed | None:
        """See `Targets.refusal`."""
        closed = self.is_on_this_host() and not os.access(_CONFIGFS, os.W_OK)
        return NotAllowed(self.label, _CONFIGFS) if closed else None

    def targets(self) -> list[Target]:
        """See `Targets.targets`."""
        answer = self._tell("show", changes=False)
        try:
            return [_target(entry) for entry in answer["targets"]]
        except (KeyError, TypeError) as e:
            raise SnapshotError(f"LIO does not answer as expected: {e}") from e

    def portals(self) -> list[str]:
        """See `Targets.portals`. Each target has its own; these are all of them."""
        return sorted({portal for target in self.targets() for portal in target.portals})

    def portals_of(self, target: Target) -> list[str]:
        """See `Targets.portals_of`."""
        return target.portals

    def admitted(self, lun: LunAddress, like: Target, duplicate: str) -> Sequence[str]:
        """See `Targets.admitted`. LIO does not tell hosts apart, only names: a snapshot admits QEMU's programs, by
        which vmsnap reads; the disk of a duplicate also the duplicate, by its own name and those that use the origin.
        """
        if not duplicate:
            return [QEMU]
        return sorted({QEMU, f"{QEMU}:{duplicate}", *filter(is_iqn, (*like.access, *like.sessions))})

    def check_initiator(self, initiator: str) -> None:
        """See `Targets.check_initiator`: a name."""
        if not is_iqn(initiator):
            raise UsageError(
                f"initiators: LIO knows initiators by their names, and {initiator!r} is none", cure="name them (iqn.…)"
            )

    def export(self, name: str, path: str, like: Target, initiators: Sequence[str], *, read_only: bool) -> None:
        """See `Targets.export`. It listens where the origin's target does."""
        answer = self._tell(
            "export", name=name, path=path, store=_store(path), like=like.name, initiators=list(initiators),
            read_only=read_only, user=self._user,
        )  # fmt: skip
        if answer.get("taken"):
            raise Taken(name)

    def delete(self, target: Target, *, force: bool) -> None:
        """See `Targets.delete`."""
        self._tell("delete", name=target.name, store=_store(target.disks[0].path) if target.disks else "", force=force)

    def release(self, path: str) -> None:
        """See `Targets.release`."""
        self._tell("release", store=_store(path))

    def _tell(self, operation: str, *, changes: bool = True, **request: Any) -> Mapping[str, Any]:
        program = resources.files(__package__).joinpath(_PROGRAM).read_text()
        try:
            done = self._runner.run(
                ["python3", "-I", "-S", "-c", program, operation, json.dumps(request)], _SECONDS, changes=changes
            )
        except DriverUnavailable as e:
            raise DriverUnavailable(e.message, cure="install it there") from e
        if done.status:
            raise SnapshotError(f"LIO could not {operation}: {one_line(done.stderr)[-400:] or f'status {done.status}'}")
        try:
            answer = json.loads(done.stdout)
            if answer.get("absent"):
                raise NotRunning("LIO serves nothing", cure="load the kernel's iscsi_target_mod, and set up a target")
            if "refused" in answer:
                raise SnapshotError(f"LIO could not {operation}: {answer['refused']}")
        except (ValueError, AttributeError) as e:
            raise SnapshotError(f"LIO does not answer as expected: {e}") from e
        return dict(answer)


def _store(path: str) -> str:
    """What the backing store of ours on that path is called."""
    return f"vmsnap-{hashlib.sha256(path.encode()).hexdigest()[:24]}"


def _target(entry: Mapping[str, Any]) -> Target:
    return Target(
        entry["name"],
        disks=[Lun(**disk) for disk in entry["disks"]],
        sessions=list(entry["sessions"]),
        accounts=list(entry["accounts"]),
        access=list(entry["access"]),
        portals=list(entry["portals"]),
    )
