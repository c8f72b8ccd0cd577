"""A folder of objects on a server: what the backend does, over a pool of connections."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock

from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, StorageFull, TransientStorageError
from vmsnap.roles.storage import ObjectInfo, StorageProperties
from vmsnap_storage_backends.sftp.connection import Connection
from vmsnap_storage_backends.sftp.conversation import Conversation, Lost, Refused
from vmsnap_storage_backends.sftp.files import CutShort, NotAFile, read_range, write_new
from vmsnap_storage_backends.sftp.listing import Listing
from vmsnap_storage_backends.sftp.names import (
    Folder,
    follow_links,
    free_room,
    link,
    look,
    make_folder,
    read_folders,
    remove,
    rename,
    rename_to_nothing,
)
from vmsnap_storage_backends.sftp.pool import Pool
from vmsnap_storage_backends.sftp.wire import HARDLINK, Code, Entry

# As the local backend has it, so that either may be used on the same folder: no object can have this name.
UNFINISHED = ".unfinished"
_HIDDEN = (UNFINISHED, "lost+found")
_DEAD_AFTER_SECONDS = 3600


class RemoteFolder:
    """The objects below one folder. Keys are checked by the caller. Used by several threads at once.

    Every method raises `StorageError` where the server refuses, and `TransientStorageError` where the connection breaks
    or does not come about now.
    """

    def __init__(self, url: str, root: str, connect: Callable[[], Connection], connections: int) -> None:
        """No I/O.

        :param url: for messages
        """
        self._url = url
        self._root = root
        self._unfinished = posixpath.join(root, UNFINISHED)
        self._pool = Pool(connect, connections)
        self._lock = Lock()
        self._known_folders: set[str] = set()
        self._swept = False
        self._left_behind: list[str] = []

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._pool.close()

    def hurry(self) -> None:
        """What waits for the server fails now."""
        self._pool.interrupt()

    def create(self) -> None:
        """Make the folder and its missing parents."""
        with self._talking("cannot make the folder") as talk:
            self._make_folders(talk, self._root)
            self._make_folders(talk, self._unfinished)

    def put(self, key: str, data: memoryview, if_absent: bool) -> None:
        """See `StorageBackend.put`."""
        target = posixpath.join(self._root, key)
        with self._talking(f"cannot write {key}", len(data)) as talk:
            self._remove_left_behind(talk)
            try:
                now = self._put(talk, target, data, if_absent)
            except Refused:
                if if_absent and look(talk, target) is not None:
                    raise ObjectExists(f"{key} exists in {self._url}") from None
                raise
            self._sweep_once(talk, now)

    def get(self, key: str, offset: int, length: int | None) -> bytes:
        """See `StorageBackend.get`."""
        path = posixpath.join(self._root, key)
        with self._talking(f"cannot read {key}") as talk:
            try:
                return read_range(talk, path, offset, length)
            except CutShort as e:
                end = offset if length is None else offset + length
                raise StorageError(f"{key} has {e.size_bytes} bytes, and {end} were asked for") from None
            except NotAFile:
                raise self._not_found(key) from None
            except Refused:
                found = look(talk, path)
                if found is None or not found.is_file:
                    raise self._not_found(key) from None
                raise

    def stat(self, key: str) -> ObjectInfo:
        """See `StorageBackend.stat`."""
        with self._talking(f"cannot look at {key}") as talk:
            found = look(talk, posixpath.join(self._root, key))
        if found is None or not found.is_file:
            raise self._not_found(key)
        return ObjectInfo(key, found.size_bytes or 0)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `StorageBackend.list`."""
        try:
            yield from Listing(self._root, _HIDDEN, self._read_folders).objects(prefix)
        except FileNotFoundError:
            raise StorageError(f"{self._url} is not there", cure="vmsnap init makes it") from None

    def delete(self, key: str) -> None:
        """See `StorageBackend.delete`."""
        path = posixpath.join(self._root, key)
        with self._talking(f"cannot delete {key}") as talk:
            folder = Folder(talk, posixpath.dirname(path))
            try:
                remove(talk, path, folder)
            except Refused:
                found = look(talk, path)
                if found is not None and found.is_file:
                    raise
            finally:
                folder.close()

    def properties(self) -> StorageProperties:
        """See `StorageBackend.properties`."""
        with self._talking("cannot ask how much room there is") as talk:
            return StorageProperties(HARDLINK in talk.extensions, free_room(talk, self._root))

    # -- inside

    @contextmanager
    def _talking(self, what: str, size_bytes: int = 0) -> Iterator[Conversation]:
        """A conversation, whose failures become errors that say `what` could not be done.

        :param size_bytes: how much room it needs
        """
        try:
            with self._pool.conversation() as talk:
                try:
                    yield talk
                except Refused as e:
                    raise self._error(talk, e, f"{what} in {self._url}", size_bytes) from e
        except Lost as e:
            raise TransientStorageError(f"{what} in {self._url}: {e}") from e

    def _error(self, talk: Conversation, refused: Refused, what: str, size_bytes: int) -> StorageError:
        if refused.code == Code.FAILURE and size_bytes:
            # Version 3 has no word for a full disk.
            room = free_room(talk, self._root)
            if room is not None and room < size_bytes:
                return StorageFull(f"{what}: {room} bytes are free", cure="free some room, or choose another place")
        return StorageError(f"{what}: {refused.message or f'the server says {refused.code}'}")

    def _not_found(self, key: str) -> ObjectNotFound:
        return ObjectNotFound(f"there is no {key} in {self._url}")

    def _put(self, talk: Conversation, target: str, data: memoryview, if_absent: bool) -> int | None:
        """Store an object; returns the server's time where it tells.

        :raises Refused: the server did not do it; nothing of it is left
        """
        temporary = posixpath.join(self._unfinished, secrets.token_hex(16))
        parent = posixpath.dirname(target)
        folder = Folder(talk, parent)
        try:
            now = self._write(talk, temporary, data)
            if parent not in self._known_folders and folder.is_missing():
                self._make_folders(talk, parent)
                folder = Folder(talk, parent)
            self._known_folders.add(parent)
            if not if_absent:
                rename(talk, temporary, target, folder)
            elif HARDLINK in talk.extensions:
                link(talk, temporary, target, folder)
            else:
                rename_to_nothing(talk, temporary, target, folder)
        except Refused:
            self._known_folders.discard(parent)
            with suppress(Refused):
                remove(talk, temporary)
            raise
        except Lost:
            with self._lock:
                self._left_behind.append(temporary)
            raise
        finally:
            folder.close()
        return now

    def _write(self, talk: Conversation, temporary: str, data: memoryview) -> int | None:
        try:
            return write_new(talk, temporary, data)
        except Refused as e:
            if e.code != Code.NO_SUCH_FILE:
                raise
        if look(talk, self._root) is None:
            raise StorageError(f"{self._url} is not there (any more)", cure="mount it there, or run: vmsnap init")
        self._make_folders(talk, self._unfinished)
        return write_new(talk, temporary, data)

    def _make_folders(self, talk: Conversation, path: str) -> None:
        """Make a folder and those above it that are missing, each durable in the one above.

        :raises Refused: the server did not do it
        """
        parent = posixpath.dirname(path)
        try:
            made = make_folder(talk, path)
        except Refused as e:
            if e.code != Code.NO_SUCH_FILE or parent in ("", path):
                raise
            self._make_folders(talk, parent)
            made = make_folder(talk, path)
        if not made:
            found = look(talk, path)
            if found is not None and found.mode is not None and not found.is_folder:
                raise StorageError(f"{path} on the server is not a folder", cure="choose another path")
            return
        above = Folder(talk, parent or ".")
        try:
            above.sync_now()
        finally:
            above.close()

    def _read_folders(self, paths: Sequence[str]) -> Sequence[Sequence[Entry] | None]:
        with self._talking("cannot list what is") as talk:
            found = read_folders(talk, paths)
            if list(paths) == [self._root] and found[0] is not None:
                # A folder that somebody moved to another disk and linked.
                return [follow_links(talk, self._root, found[0])]
            return found

    def _remove_left_behind(self, talk: Conversation) -> None:
        """Remove what a broken connection left of puts of this instance."""
        while self._left_behind:
            with self._lock:
                path = self._left_behind.pop() if self._left_behind else ""
            if path:
                with suppress(Refused):
                    remove(talk, path)

    def _sweep_once(self, talk: Conversation, now: int | None) -> None:
        """Remove what writers that are gone have left, by the server's clock. A writer that lives writes on, or is
        given up by its time-out long before. What cannot be removed is left.
        """
        with self._lock:
            if self._swept or now is None:
                return
            self._swept = True
        with suppress(Refused):
            (entries,) = read_folders(talk, [self._unfinished])
            for entry in entries or ():
                mtime = entry.attributes.mtime
                if entry.attributes.is_file and mtime is not None and now - mtime > _DEAD_AFTER_SECONDS:
                    remove(talk, posixpath.join(self._unfinished, entry.name))
