"""The backend as vmsnap sees it: cheap to import and to make; what talks to the server is imported when it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

from vmsnap.errors import DriverUnavailable, StorageError
from vmsnap.model import Finding
from vmsnap.roles import PATH, Module, Need, Option, whole_number, with_defaults
from vmsnap.roles.storage import ObjectInfo, StorageBackend, StorageProperties, check_key
from vmsnap_storage_backends.sftp.address import parse_address

if TYPE_CHECKING:
    from vmsnap_storage_backends.sftp.connection import Connection
    from vmsnap_storage_backends.sftp.remote import RemoteFolder

CONFIG_VARIABLE = "VMSNAP_SSH_CONFIG"
_CONNECTIONS = whole_number(1, 64)
_TIMEOUT = whole_number(1)


class SftpStorage(StorageBackend):
    """Keeps the object ``packs/ab/cdef`` as the file ``packs/ab/cdef`` below the folder of its URL, which a
    `LocalStorage` on the server can use too.

    URL: ``sftp://user@host:port/path``, or ``/~/path`` below the folder in which the server puts the user. How the host
    is reached, with which key and through which others, is what ``~/.ssh/config`` says; who the server is must stand in
    ``known_hosts``. Files are 0600, folders 0700. An object is written to a temporary file in ``.unfinished``, fsynced
    (where the server offers ``fsync@openssh.com``), and given its name by ``posix-rename@openssh.com`` or, where it
    must not replace another, ``hardlink@openssh.com``; its folder is fsynced. Temporary files of writers that are
    gone are removed at the first `put` of an instance, when they are older than an hour by the server's clock.

    Without ``posix-rename`` there is a moment without an object when one is replaced; without ``hardlink`` a put
    `if_absent` looks first. `doctor` says so.
    """

    name: ClassVar[str] = "sftp"
    options: ClassVar[Sequence[Option]] = (
        Option(
            "connections",
            "How many connections may be open at the same time; two are used if the server is near.",
            "4",
            type=_CONNECTIONS,
        ),
        Option(
            "timeout",
            "How long the server may be silent before the connection is given up.",
            default="60",
            type=_TIMEOUT,
        ),
        Option(
            "config",
            f"An ssh_config file in place of the user's and the system's own. [env: {CONFIG_VARIABLE}]",
            type=PATH,
        ),
    )
    needs: ClassVar[Sequence[Need]] = (Module("paramiko", "pip install 'vmsnap[sftp]'"),)

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        """:raises DriverUnavailable: paramiko is not installed"""
        self.address = parse_address(url)
        super().__init__(str(self.address), options or {})
        if find_spec("paramiko") is None:
            raise DriverUnavailable("sftp:// needs paramiko, which is not installed", cure="pip install vmsnap[sftp]")
        given = with_defaults(self.options, options or {})
        self._connections = _CONNECTIONS.read(given["connections"], "connections")
        self._timeout_seconds = _TIMEOUT.read(given["timeout"], "timeout")
        config = given.get("config") or os.environ.get(CONFIG_VARIABLE)
        self._config_file = Path(config).expanduser() if config else None
        self._lock = Lock()
        self._folder: RemoteFolder | None = None

    def create(self) -> None:
        """Make the folder, its missing parents too; idempotent.

        :raises StorageError: it cannot be made, or something else has its name
        """
        self._remote().create()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See `StorageBackend.put`."""
        self._remote().put(check_key(key), memoryview(data).cast("B"), if_absent)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `StorageBackend.get`."""
        check_key(key)
        if offset < 0 or (length is not None and length < 0):
            raise StorageError(f"{key}: there is no range of {length} bytes from {offset}")
        return self._remote().get(key, offset, length)

    def stat(self, key: str) -> ObjectInfo:
        """See `StorageBackend.stat`."""
        return self._remote().stat(check_key(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `StorageBackend.list`. Holds the names of a few folders at a time. Files that are not ours are listed
        too, under whatever name they have, so that nobody takes the folder for an empty one.
        """
        return self._remote().list(prefix)

    def delete(self, key: str) -> None:
        """See `StorageBackend.delete`. The folder stays, so that a `put` at the same moment finds it."""
        self._remote().delete(check_key(key))

    def properties(self) -> StorageProperties:
        """Conditional puts are atomic where the server can link; room is what it says, if it does."""
        return self._remote().properties()

    def doctor(self) -> Sequence[Finding]:
        """See `StorageBackend.doctor`."""
        from vmsnap_storage_backends.sftp.examination import examine

        return examine(self.address, self._config_file, self._timeout_seconds)

    def hurry(self) -> None:
        """See `StorageBackend.hurry`: the connections that are in use are closed."""
        with self._lock:
            folder = self._folder
        if folder is not None:
            folder.hurry()

    def close(self) -> None:
        """Close the connections; idempotent."""
        with self._lock:
            folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()

    def _remote(self) -> RemoteFolder:
        from vmsnap_storage_backends.sftp.connection import connect
        from vmsnap_storage_backends.sftp.remote import RemoteFolder

        with self._lock:
            if self._folder is None:

                def dial() -> Connection:
                    return connect(self.address, self._config_file, self._timeout_seconds)

                self._folder = RemoteFolder(self.url, self.address.path, dial, self._connections)
            return self._folder
