"""vmsnap repositories on a WebDAV server (RFC 4918), with nothing but the standard library.

The object ``packs/ab`` is the resource ``packs/ab~``. No key has a ``~``, so that no object is ever taken for a folder:
to DELETE a folder would remove all that is in it. An object is sent under a name of its own first (``packs/ab~`` and
random letters), and then renamed by MOVE.

What the server must do for the contract to hold: MOVE renames at once (``rename(2)``), also over a resource that is
there, and what was stored stays. lighttpd's mod_webdav does; mod_dav of Apache removes the old resource first, as the
RFC has it, and so leaves a moment without either.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence

from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError
from vmsnap.model import Finding
from vmsnap.roles import (
    PATH,
    YES_NO,
    ObjectInfo,
    Option,
    StorageBackend,
    StorageProperties,
    check_key,
    seconds,
    with_defaults,
)
from vmsnap_webdav.connection import Connections
from vmsnap_webdav.listing import ASK, Entry, entries_in

MARK = "~"
TIMEOUT = seconds()


class WebdavStorage(StorageBackend):
    """Keeps every object as a file of a WebDAV server. URL: ``webdav://host:port/folder``.

    User and password come from ``~/.netrc``, and go over TLS only (``webdavs://``), or to this host itself.
    """

    name = "webdav"
    options = (
        Option("atomic_move", "the server refuses a MOVE onto what another one has just made", "no", type=YES_NO),
        Option("timeout", "after how long a request is given up", "60", type=TIMEOUT),
        Option("ca", "file with the certificates that sign the server's, for webdavs", type=PATH),
    )

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        """No I/O.

        :raises UsageError: the URL names no server, or holds a password; the time-out is no number
        """
        super().__init__(url, options)
        given = with_defaults(self.options, options)
        self._connections = Connections(url, self.name, TIMEOUT.read(given["timeout"]), given.get("ca"))
        self._atomic_move = YES_NO.read(given["atomic_move"])

    def _path(self, key: str) -> str:
        return f"{self._connections.folder}/{check_key(key)}{MARK}"

    def create(self) -> None:
        """Make the folder; the one that it lies in must be there."""
        # 405: it exists, by RFC 4918, 9.3.1
        done = self._connections.request("MKCOL", f"{self._connections.folder}/", expected=(201, 405, 409))
        if done.status == 409:
            raise StorageError(f"{self.url}: the folder above it is not there", cure="make it on the server")

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See the role: a PUT under a name of its own, and a MOVE, which is the moment at which the object is there."""
        path = self._path(key)
        if if_absent and self._size(path) is not None:
            raise ObjectExists(f"{key} exists in {self.url}")
        part = path + secrets.token_hex(8)
        if not data:
            self._make_folders(key)  # lighttpd 1.4.69 answers 500 instead of 409 where an empty file lacks its folder
        if self._connections.request("PUT", part, data, expected=(201, 204, 404, 409)).status in (404, 409):
            self._make_folders(key)
            self._connections.request("PUT", part, data, expected=(201, 204))
        headers = {"Destination": self._connections.absolute(path), "Overwrite": "F" if if_absent else "T"}
        try:
            moved = self._connections.request("MOVE", part, headers=headers, expected=(201, 204, 412))
        except StorageError:
            self._connections.request("DELETE", part, expected=None)
            raise
        if moved.status == 412:
            self._connections.request("DELETE", part, expected=(204, 404))
            raise ObjectExists(f"{key} exists in {self.url}")

    def _make_folders(self, key: str) -> None:
        """The folders of a key, below the repository's own, which only `create` makes."""
        at = self._connections.folder
        for word in key.split("/")[:-1]:
            at += f"/{word}"
            if self._connections.request("MKCOL", f"{at}/", expected=(201, 405, 409)).status == 409:
                raise StorageError(f"{self.url} is not there", cure="see the server, or run: vmsnap init")

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See the role; a part is asked for by ``Range``."""
        path = self._path(key)
        if offset == 0 and length is None:
            whole = self._connections.request("GET", path, expected=(200, 404))
            if whole.status == 404:
                raise ObjectNotFound(f"there is no {key} in {self.url}")
            return whole.body
        if length == 0 or offset < 0:
            return self._nothing(key, path, offset, length)
        end = "" if length is None else str(offset + length - 1)
        part = self._connections.request(
            "GET", path, headers={"Range": f"bytes={offset}-{end}"}, expected=(200, 206, 404, 416)
        )
        if part.status == 404:
            raise ObjectNotFound(f"there is no {key} in {self.url}")
        if part.status == 416:
            return self._nothing(key, path, offset, length)
        body = part.body
        if part.status == 200:  # a server may ignore Range (RFC 9110, 14.2); lighttpd does for an empty file
            if offset > len(body):
                return self._nothing(key, path, offset, length)
            body = body[offset : None if length is None else offset + length]
        if length is not None and len(body) != length:
            raise StorageError(f"{key} in {self.url}: {len(body)} of {length} bytes from {offset}")
        return body

    def _nothing(self, key: str, path: str, offset: int, length: int | None) -> bytes:
        """The range of no bytes, for which HTTP has no words."""
        size = self._size(path)
        if size is None:
            raise ObjectNotFound(f"there is no {key} in {self.url}")
        if not 0 <= offset <= size or length:
            raise StorageError(f"{key} in {self.url} has {size} bytes: there is no range of {length} from {offset}")
        return b""

    def _size(self, path: str) -> int | None:
        found = self._connections.request("HEAD", path, expected=(200, 404))
        return found.size_bytes if found.status == 200 else None

    def stat(self, key: str) -> ObjectInfo:
        """See the role."""
        size = self._size(self._path(key))
        if size is None:
            raise ObjectNotFound(f"there is no {key} in {self.url}")
        return ObjectInfo(key, size)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See the role. One folder at a time is in memory, and those above it."""
        yield from self._list_folder("", prefix)

    def _list_folder(self, below: str, prefix: str) -> Iterator[ObjectInfo]:
        # The order of keys is that of the names where "/" is part of a folder's.
        for name, entry in sorted((self._in_keys(entry), entry) for entry in self._entries(below)):
            key = below + name
            if entry.folder and (key.startswith(prefix) or prefix.startswith(key)):
                yield from self._list_folder(key, prefix)
            elif entry.name.endswith(MARK) and key.startswith(prefix):
                yield ObjectInfo(key, entry.size_bytes)

    @staticmethod
    def _in_keys(entry: Entry) -> str:
        return f"{entry.name}/" if entry.folder else entry.name.removesuffix(MARK)

    def _entries(self, below: str) -> Sequence[Entry]:
        path = f"{self._connections.folder}/{below}"
        headers = {"Depth": "1", "Content-Type": "application/xml"}
        answer = self._connections.request("PROPFIND", path, ASK, headers=headers, expected=(207, 404))
        if answer.status == 207:
            return entries_in(answer.body, self.url)
        if not below:
            raise StorageError(f"{self.url} is not there", cure="see the server, or run: vmsnap init")
        return []  # the folder was removed meanwhile

    def delete(self, key: str) -> None:
        """See the role."""
        self._connections.request("DELETE", self._path(key), expected=(200, 204, 404))

    def properties(self) -> StorageProperties:
        """See the role. WebDAV says what is free by quota (RFC 4331), which few servers have."""
        return StorageProperties(conditional_put=self._atomic_move)

    def doctor(self) -> Sequence[Finding]:
        """See the role."""
        try:
            names = [entry.name for entry in self._entries("")]
        except StorageError as e:
            return [Finding(self.url, "missing", e.message, e.cure)]
        found = [Finding(self.url, "ok", f"{len(names)} names in the folder")]
        if not self._atomic_move:
            cure = "if it cannot happen on this server: -o atomic_move=yes"
            found.append(Finding(self.url, "note", "two writers could make the same object at once", cure))
        return found

    def hurry(self) -> None:
        """See the role: requests that are on their way fail."""
        self._connections.interrupt()

    def close(self) -> None:
        """See the role."""
        self._connections.close()


class WebdavsStorage(WebdavStorage):
    """The same over TLS. URL: ``webdavs://host/folder``."""

    name = "webdavs"
