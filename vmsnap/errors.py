"""The errors of vmsnap: one tree, each class says what the caller can do about it.

::

    VmsnapError                    1  failed, nothing lost
    ├── UsageError                 2  wrong usage or configuration: correct the call
    │   └── WrongPassphrase        2
    ├── NotFound                   3  what was named does not exist
    │   ├── UnknownVm
    │   ├── UnknownBackup
    │   ├── UnknownDuplicate
    │   ├── ObjectNotFound            a storage backend has no object of that key
    │   └── NotARepository
    ├── DamageFound                4  stored data is not what was written
    │   └── NewerFormat               one among many objects, and only a newer vmsnap can read it
    ├── Busy                       5  somebody else is at it: try again later
    ├── DriverUnavailable          6  install what the message names
    ├── AlreadyExists              1  would overwrite something: choose another name
    │   └── ObjectExists              a conditional put met an object
    ├── HypervisorError            1
    │   ├── CannotCapture             the VM has something that cannot be captured truthfully; nothing was paused
    │   ├── VmGone                    the VM ended or vanished
    │   └── PauseExceeded             the guest would have stood still too long; it runs again
    ├── SnapshotError              1
    │   └── SnapshotInUse          5  a Busy too: what was to be removed is in use
    ├── StorageError               1
    │   ├── StorageFull
    │   ├── TransientStorageError     may succeed when asked again; wrappers retry it
    │   └── ObjectRetained            the storage keeps the object until a time, whatever it is told
    ├── RepositoryError            1
    └── ProtocolError              1  a defect in vmsnap or a driver: an instruction out of order

    KeyboardInterrupt
    └── Interrupted              130  the user or the system asked to stop

Every message is one line that names the thing; ``cure`` (one line too) says what to do. Neither ever holds a secret.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar


class VmsnapError(Exception):
    """Base of all errors that vmsnap raises on purpose.

    :param message: one line that names what failed and on what
    :param cure: one line that says what the person at the keyboard can do; empty where nobody can
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message} ({self.cure})" if self.cure else self.message


class UsageError(VmsnapError):
    """The call, an option or the configuration is wrong; nothing was begun."""

    exit_code = 2


class WrongPassphrase(UsageError):
    """No key of the repository opens with this passphrase."""


class NotFound(VmsnapError):
    """What was named does not exist."""

    exit_code = 3


class UnknownVm(NotFound):
    """No VM of that name is registered, or the hypervisor does not know it."""


class UnknownBackup(NotFound):
    """The repository has no backup of that id."""


class UnknownDuplicate(NotFound):
    """No duplicate of that name is held in memory."""


class ObjectNotFound(NotFound):
    """The storage backend has no object under that key."""


class NotARepository(NotFound):
    """There is no vmsnap repository at that address."""


class DamageFound(VmsnapError):
    """Stored data is not what was written; the message names what it touches."""

    exit_code = 4


class NewerFormat(DamageFound):
    """A newer vmsnap wrote this one of many objects: it may be whole, and nobody here can say what it holds."""


class Busy(VmsnapError):
    """Another process works on the same thing; nothing was begun."""

    exit_code = 5


class DriverUnavailable(VmsnapError):
    """The driver is not installed, broken, or lacks something on this host; the cure names it."""

    exit_code = 6


class AlreadyExists(VmsnapError):
    """Something of that name exists and is not overwritten."""


class ObjectExists(AlreadyExists):
    """A conditional put found an object under its key; that object is untouched."""


class HypervisorError(VmsnapError):
    """The hypervisor refused or failed a call."""


class CannotCapture(HypervisorError):
    """The VM cannot be captured truthfully; found before anything was paused."""


class DoesNotConverge(CannotCapture):
    """The guest changes its memory faster than this way of capture copies it, and another way can be: see
    `CaptureRequest.without`.

    :ivar capture: the way that was tried
    """

    def __init__(self, message: str, capture: str) -> None:
        super().__init__(message, cure=f"try again without {capture}")
        self.capture = capture


class VmGone(HypervisorError):
    """The VM ended, crashed or cannot be reached any more."""


class PauseExceeded(HypervisorError):
    """The pause would have passed its limit; it was given up and the guest runs again."""


class SnapshotError(VmsnapError):
    """A snapshot mechanism failed."""


class SnapshotInUse(SnapshotError, Busy):
    """Somebody uses what a snapshot mechanism was to remove; a later call tries again."""


class StorageError(VmsnapError):
    """A storage backend failed; what was complete before stays complete."""


class StorageFull(StorageError):
    """No room is left where it is needed."""


class TransientStorageError(StorageError):
    """The storage was cut off, timed out, or said that it cannot now: the same call may succeed when it is made again.

    Storage backends raise it instead of trying again, which `vmsnap.retrying` does for all of them. `overloaded`: the
    storage asked to be called less often. Whether the call that failed had its effect is not known.
    """

    def __init__(self, message: str, *, cure: str = "", overloaded: bool = False) -> None:
        super().__init__(message, cure=cure)
        self.overloaded = overloaded


class ObjectRetained(StorageError):
    """The storage refuses to delete or replace an object before a time, and nobody can make it.

    :param until: that time, UTC
    """

    def __init__(self, message: str, *, until: datetime, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.until = until


class RepositoryError(VmsnapError):
    """The repository cannot be used so, for example because a newer vmsnap wrote it."""


class ProtocolError(VmsnapError):
    """An instruction was given out of order: a defect in vmsnap or in a driver."""


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop.

    Outside of the tree on purpose, as KeyboardInterrupt is outside of Exception: what catches an error and goes on must
    not catch this. It has the same attributes.
    """

    exit_code: ClassVar[int] = 130

    def __init__(self, message: str, *, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
