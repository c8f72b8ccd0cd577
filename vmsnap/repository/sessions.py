"""Who reads or writes the repository now: ``sessions/<16 hex>``, so that garbage collection knows for whom to wait.

The session object is put once, before anything else of the operation, and deleted once: by its owner at the end, or by
a garbage collection that takes the owner for dead. It is never put again, so a session that is gone stays gone, and its
owner can tell by `Session.require`. That the owner lives is said by a second object, ``sessions/<16 hex>.heartbeat``.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from vmsnap.errors import ObjectNotFound, RepositoryError, StorageError, VmsnapError
from vmsnap.host import boot_id, process_start
from vmsnap.model import from_json, to_json
from vmsnap.repository.format import SESSIONS_PREFIX
from vmsnap.repository.seal import BrokenSeal, Vault
from vmsnap.roles.storage import StorageBackend

SessionKind: TypeAlias = Literal["write", "read", "gc"]

DEAD_AFTER_SECONDS = 86400.0
"""A session of which nothing was heard for so long is taken for dead."""
HEARTBEAT_SECONDS = 600.0

_HEARTBEAT = ".heartbeat"
_SESSION_KEY = re.compile(re.escape(SESSIONS_PREFIX) + r"[0-9a-f]{16}")


@dataclass(frozen=True)
class SessionRecord:
    """What a session object holds. `host` is for people; `boot` and `pid_namespace` say where `pid` means something
    (empty where the system does not tell), `process_start` makes it unique there. `begun` is UTC, RFC 3339.
    """

    kind: SessionKind
    purpose: str
    host: str
    boot: str
    pid_namespace: str
    pid: int
    process_start: int
    begun: str


@dataclass(frozen=True)
class _Heartbeat:
    time: str


@dataclass(frozen=True)
class SessionInfo:
    """A session that was found. `record` is None where the object is not what was written: it counts as alive, since
    nobody knows. `silent_seconds` is how long nothing was heard; `dead` says why it is dead, empty where it is not.
    """

    key: str
    record: SessionRecord | None
    silent_seconds: float
    dead: str

    @property
    def description(self) -> str:
        """One line for people, the key included."""
        if self.record is None:
            return f"{self.key}: unreadable (delete this object when no vmsnap uses the repository)"
        record = self.record
        return f"{self.key}: {record.purpose} ({record.kind}), process {record.pid} on {record.host}, {record.begun}"


class Session:
    """One operation that reads, writes or collects; a context manager around all of it.

    While it lasts, a daemon thread tells every ten minutes that it does.
    """

    def __init__(self, storage: StorageBackend, vault: Vault, kind: SessionKind, purpose: str) -> None:
        """:param purpose: for people: ``backup of vm001``"""
        self.key = SESSIONS_PREFIX + secrets.token_hex(8)
        self._storage = storage
        self._vault = vault
        self._kind: SessionKind = kind
        self._purpose = purpose
        self._noted = False
        self._ended = threading.Event()
        self._heartbeats = threading.Thread(target=self._beat, name="vmsnap-session", daemon=True)
        self._has_beaten = False

    def __enter__(self) -> Session:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        """Put the session object; to be called once, before anything of the repository is read.

        :raises StorageError: it cannot be put. A ``read`` session passes over that: who only reads a storage that it
            cannot write to reads on, and finds what was moved meanwhile by reading the index again.
        """
        record = SessionRecord(
            kind=self._kind,
            purpose=self._purpose,
            host=socket.gethostname(),
            boot=_boot(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()) or 0,
            begun=_now(),
        )
        try:
            self._storage.put(self.key, self._vault.seal_object(self.key, to_json(record).encode()))
        except StorageError:
            if self._kind != "read":
                # The answer can have been lost.
                with suppress(StorageError):
                    self._storage.delete(self.key)
                raise
            return
        self._noted = True
        self._heartbeats.start()

    def end(self) -> None:
        """Delete the session object and stop the heartbeat; idempotent. What cannot be deleted stays, and is taken for
        dead when this process has ended.
        """
        if not self._noted or self._ended.is_set():
            return
        self._ended.set()
        self._heartbeats.join(5)
        with suppress(StorageError):
            if self._has_beaten:
                self._storage.delete(self.key + _HEARTBEAT)
            self._storage.delete(self.key)

    def require(self) -> None:
        """Make sure that nobody has taken this session for dead; later ones may rely on what it relied on.

        :raises RepositoryError: it was deleted
        :raises StorageError: the storage failed
        """
        try:
            self._storage.stat(self.key)
        except ObjectNotFound as e:
            raise RepositoryError(
                f"a garbage collection took this session ({self._purpose}) for dead and may have deleted what it used",
                cure="begin again; let gc wait longer with --dead-after where hosts are suspended or clocks are wrong",
            ) from e

    def _beat(self) -> None:
        key = self.key + _HEARTBEAT
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # One that is missed costs nothing: many are, before a session is dead.
            with suppress(VmsnapError):
                self._has_beaten = True
                self._storage.put(key, self._vault.seal_object(key, to_json(_Heartbeat(_now())).encode()))


def list_sessions(
    storage: StorageBackend, vault: Vault, dead_after_seconds: float = DEAD_AFTER_SECONDS
) -> Sequence[SessionInfo]:
    """All sessions, living and dead ones, in the order of their keys. Blocks.

    A session is dead when its process on this host has ended, or nothing was heard of it for `dead_after_seconds`.

    :raises StorageError: the storage failed
    """
    found = []
    for key in [info.key for info in storage.list(SESSIONS_PREFIX)]:
        if _SESSION_KEY.fullmatch(key):
            with suppress(ObjectNotFound):  # it ended meanwhile
                found.append(_look_at(storage, vault, key, dead_after_seconds))
    return found


def collectors(storage: StorageBackend, vault: Vault, but: str) -> Sequence[SessionInfo]:
    """The living sessions, besides that of the key `but`, that collect garbage or repair. Blocks.

    :raises StorageError: the storage failed
    """
    others = [other for other in list_sessions(storage, vault) if other.key != but and not other.dead]
    return [other for other in others if other.record and other.record.kind == "gc"]


def delete_session(storage: StorageBackend, key: str) -> None:
    """Remove a dead session; idempotent. The session object first: a heartbeat alone is nothing.

    :raises StorageError: the storage failed
    """
    storage.delete(key)
    storage.delete(key + _HEARTBEAT)


def delete_stray_heartbeats(storage: StorageBackend) -> None:
    """Remove the heartbeats that a session wrote after it had been taken for dead; idempotent.

    :raises StorageError: the storage failed
    """
    keys = {info.key for info in storage.list(SESSIONS_PREFIX)}
    for key in keys:
        if key.endswith(_HEARTBEAT) and key.removesuffix(_HEARTBEAT) not in keys:
            storage.delete(key)


def _look_at(storage: StorageBackend, vault: Vault, key: str, dead_after_seconds: float) -> SessionInfo:
    data = storage.get(key)
    try:
        record = from_json(vault.open_object(key, data), SessionRecord)
        heard = datetime.fromisoformat(record.begun)
    except (BrokenSeal, ValueError):
        return SessionInfo(key, None, 0.0, "")
    beat = key + _HEARTBEAT
    with suppress(ObjectNotFound, BrokenSeal, ValueError):
        heard = datetime.fromisoformat(from_json(vault.open_object(beat, storage.get(beat)), _Heartbeat).time)
    silent_seconds = (datetime.now(UTC) - heard.replace(tzinfo=heard.tzinfo or UTC)).total_seconds()
    dead = ""
    if _has_ended(record):
        dead = f"process {record.pid} has ended"
    elif silent_seconds > dead_after_seconds:
        dead = f"nothing was heard of it for {silent_seconds / 3600:.1f} hours"
    return SessionInfo(key, record, silent_seconds, dead)


def _has_ended(record: SessionRecord) -> bool:
    """Whether the process that had the session is known to be gone. Only for processes that this one could see."""
    if not record.boot or not record.pid_namespace or not record.process_start:
        return False
    if record.boot != _boot() or record.pid_namespace != _pid_namespace():
        return False
    start = process_start(record.pid)
    if start is not None:
        return start != record.process_start
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and hidden from this user
        return False
    return process_start(record.pid) != record.process_start  # a zombie, or the pid was taken by another one just now


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _boot() -> str:
    with suppress(OSError):
        return boot_id()
    return ""


def _pid_namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
