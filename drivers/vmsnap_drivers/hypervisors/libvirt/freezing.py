"""Freezes the file systems of a guest by its agent, and sees to it that they are thawed again, by whichever process.

A mark is written before anything is frozen, and taken away when the agent has said that all is thawed. Whoever makes
the VM execute, or gives its capture up, looks for it: the worker, the guardian, a recovery. A captured guest is frozen
in its memory, so one that is loaded has a mark from the beginning. (The thaw cannot be left in its channel before it
runs: a virtio port takes nothing while the VM stands still.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.durable import make_writable_folder
from vmsnap.errors import Busy, CannotCapture, HypervisorError
from vmsnap.model import to_json
from vmsnap_drivers.hypervisors.libvirt.agent import SYNC_SECONDS, AgentPlace, ask
from vmsnap_drivers.qemu.peer import boot_id, start_time
from vmsnap_drivers.qemu.smallfile import read_whole, write_whole

DETAIL: Final = "fsfreeze"
"""Under this name the manifest tells of it, and a load learns that the guest is frozen in its memory."""
_FREEZE: Final = "guest-fsfreeze-freeze"
_THAW: Final = "guest-fsfreeze-thaw"
_STATUS: Final = "guest-fsfreeze-status"
_THAWED: Final = "thawed"
_ANSWER_SECONDS: Final = 3.0
_THAW_SECONDS: Final = 30.0
_BETWEEN_TRIES_SECONDS: Final = 0.1


def longest_seconds(allowed_seconds: float) -> float:
    """How long `FrozenFileSystems.freeze` may block where so much is allowed."""
    return allowed_seconds + SYNC_SECONDS


@dataclass(frozen=True)
class FreezeMark:
    """A guest that may be frozen.

    :ivar pid: its QEMU, with the time of its start
    """

    vm: str
    boot: str
    pid: int
    pid_started: int
    place: AgentPlace

    def qemu_lives(self) -> bool:
        """Whether the very QEMU still runs."""
        return self.boot == boot_id() and start_time(self.pid) == self.pid_started


class FrozenFileSystems:
    """Those of one VM; the mark is at `path`."""

    def __init__(self, vm: str, path: Path) -> None:
        """No I/O."""
        self._vm = vm
        self._path = path
        self._frozen_at: float | None = None

    def check(self, place: AgentPlace) -> None:
        """See, while the guest runs and nothing is touched, that its agent answers and that nothing is frozen.

        :raises CannotCapture: it does not
        :raises Busy: somebody else has frozen the guest
        """
        try:
            status = ask(place, _STATUS, _ANSWER_SECONDS)
        except HypervisorError as e:
            raise CannotCapture(
                f"the guest agent of VM {self._vm!r} does not answer: {e.message}",
                cure="install and start qemu-guest-agent in the guest, or leave -o fsfreeze=yes out",
            ) from e
        if status != _THAWED:
            raise Busy(
                f"the file systems of VM {self._vm!r} are frozen by somebody else",
                cure=f"let them thaw: virsh domfsthaw {place.uuid}",
            )

    def freeze(self, place: AgentPlace, pid: int, seconds: float) -> int:
        """Freeze them within `seconds`; returns how many there are. Whatever happens, `thaw` has to follow.

        :raises HypervisorError: they are not frozen in time, or the agent refuses
        :raises VmsnapError: the mark cannot be written; nothing is frozen
        """
        self._write(place, pid)
        self._frozen_at = time.monotonic()
        try:
            number = ask(place, _FREEZE, seconds)
        except HypervisorError as e:
            raise HypervisorError(
                f"the file systems of VM {self._vm!r} were not frozen within {seconds:g} s: {e.message}",
                cure="allow more with -o fsfreeze_timeout=SECONDS, or leave -o fsfreeze=yes out",
            ) from e
        # What a guest says is not to be relied on.
        return number if isinstance(number, int) else 0

    def note_loaded(self, place: AgentPlace, pid: int) -> None:
        """A guest that was captured frozen was loaded, and does not run yet: whoever lets it run is to thaw it."""
        self._write(place, pid)

    def is_marked(self) -> bool:
        """Whether they may be frozen."""
        return self._path.exists()

    def thaw(self) -> float | None:
        """Thaw them, the guest running, and see that they are; returns for how many seconds they were frozen, None
        where this object has not frozen them. Idempotent. Blocks for 30 s, and for a last try.

        :raises HypervisorError: the agent does not answer; they may be frozen
        """
        mark = read_whole(self._path, FreezeMark, "the mark of a frozen guest")
        if mark is None:
            return None
        if not mark.qemu_lives():
            self.forget()
            return None
        deadline = time.monotonic() + _THAW_SECONDS
        while True:
            try:
                ask(mark.place, _THAW, _ANSWER_SECONDS)
                if ask(mark.place, _STATUS, _ANSWER_SECONDS) == _THAWED:
                    break
                why = "it says that they are still frozen"
            except HypervisorError as e:
                why = e.message
            if not mark.qemu_lives():
                break
            if time.monotonic() > deadline:
                raise HypervisorError(
                    f"the file systems of VM {self._vm!r} may be frozen, and its guest agent does not thaw them: {why}",
                    cure=f"vmsnap recover {self._vm}, or: virsh domfsthaw {mark.place.uuid}",
                )
            time.sleep(_BETWEEN_TRIES_SECONDS)
        self.forget()
        return None if self._frozen_at is None else time.monotonic() - self._frozen_at

    def forget(self) -> None:
        """The VM has ended, or all is thawed. Idempotent."""
        self._path.unlink(missing_ok=True)

    def _write(self, place: AgentPlace, pid: int) -> None:
        make_writable_folder(self._path.parent)
        write_whole(self._path, to_json(FreezeMark(self._vm, boot_id(), pid, start_time(pid) or 0, place)))
