"""Objects as files below one folder: a local disk, or anything that is mounted as one."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from threading import Lock
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from vmsnap.durable import sync
from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, StorageFull, UsageError
from vmsnap.model import Finding
from vmsnap.pagecache import QuietReader, QuietWriter, forget
from vmsnap.roles.options import Option
from vmsnap.roles.storage import ObjectInfo, StorageBackend, StorageProperties, check_key

# A key's words begin with a letter or a digit, so no object can have this name.
_UNFINISHED = ".unfinished"
_DEAD_AFTER_SECONDS = 3600.0
# Smaller objects may stay in the page cache, and so may small parts of large ones, which are tree nodes mostly: the
# next command reads them again.
_LARGE_OBJECT_BYTES = 1 << 20
_LARGE_PART_BYTES = 64 << 10
_LITTLE_BYTES = 1 << 30
_TOO_LITTLE_BYTES = 64 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStorage(StorageBackend):
    """Keeps the object ``packs/ab/cdef`` as the file ``packs/ab/cdef`` below its folder.

    URL: ``file:///folder`` (percent-encoded where needed) or a plain path. Files are 0600, folders 0700. An object is
    written to a temporary file in the same file system, fsynced, and then given its name by ``rename`` (or ``link``,
    where it must not replace another), and its folder is fsynced. Temporary files lie in ``.unfinished`` and are
    locked while their writer lives; those of dead writers are removed at the first `put` of an instance, when they
    are older than an hour.
    """

    name: ClassVar[str] = "file"
    options: ClassVar[Sequence[Option]] = ()
    remote: ClassVar[bool] = False
    reopens: ClassVar[bool] = True

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        super().__init__(url, options or {})
        self.folder = _folder_of(url)
        self._lock = Lock()
        self._swept = False
        self._durable_folders: set[Path] = set()

    def create(self) -> None:
        """Make the folder, its missing parents too, durably; idempotent.

        :raises StorageError: it cannot be made, or something else has its name
        """
        try:
            self._make_folder(self.folder)
        except OSError as e:
            raise _storage_error(e, f"cannot make the folder {self.folder}") from e

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See `StorageBackend.put`. Atomic also against other processes and, where the file system is, other hosts."""
        target = self._path(key)
        try:
            if not self.folder.is_dir():
                raise StorageError(f"{self.folder} is not there (any more)", cure="mount it, or run: vmsnap init")
            self._sweep_once()
            self._make_folder(target.parent)
            self._put(target, data, if_absent)
        except FileExistsError as e:
            raise ObjectExists(f"{key} exists in {self.folder}") from e
        except OSError as e:
            raise _storage_error(e, f"cannot write {key} in {self.folder}") from e

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `StorageBackend.get`."""
        path = self._path(key)
        if offset < 0 or (length is not None and length < 0):
            raise StorageError(f"{key}: there is no range of {length} bytes from {offset}")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return _read_range(fd, key, offset, length)
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise ObjectNotFound(f"there is no {key} in {self.folder}") from e
        except OSError as e:
            raise _storage_error(e, f"cannot read {key} in {self.folder}") from e

    def stat(self, key: str) -> ObjectInfo:
        """See `StorageBackend.stat`."""
        path = self._path(key)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError) as e:
            raise ObjectNotFound(f"there is no {key} in {self.folder}") from e
        except OSError as e:
            raise _storage_error(e, f"cannot look at {key} in {self.folder}") from e
        if not stat.S_ISREG(found.st_mode):
            raise ObjectNotFound(f"{key} in {self.folder} is not an object")
        return ObjectInfo(key, found.st_size)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `StorageBackend.list`. Holds the names of one folder at a time.

        Files that are not ours are listed too, under whatever name they have, so that nobody takes the folder for
        an empty one.
        """
        try:
            yield from self._list(self.folder, "", prefix)
        except OSError as e:
            raise _storage_error(e, f"cannot list {self.folder}") from e

    def delete(self, key: str) -> None:
        """See `StorageBackend.delete`. The folder stays, so that a `put` at the same moment finds it."""
        path = self._path(key)
        try:
            path.unlink()
            sync(path.parent)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as e:
            raise _storage_error(e, f"cannot delete {key} in {self.folder}") from e

    def properties(self) -> StorageProperties:
        """Conditional puts are atomic here; room is what the file system gives to this user."""
        try:
            room = os.statvfs(self.folder)
        except OSError as e:
            raise _storage_error(e, f"cannot ask how much room {self.folder} has") from e
        return StorageProperties(conditional_put=True, free_bytes=room.f_bavail * room.f_frsize)

    def doctor(self) -> Sequence[Finding]:
        """See `StorageBackend.doctor`."""
        subject = f"folder {self.folder}"
        try:
            return self._examine(subject)
        except OSError as e:
            return [Finding(subject, "missing", f"cannot be looked at: {e.strerror}", "run as its owner")]

    # -- inside

    def _examine(self, subject: str) -> Sequence[Finding]:
        if not self.folder.exists():
            parent = next(p for p in self.folder.parents if p.exists())
            if not os.access(parent, os.W_OK | os.X_OK):
                return [Finding(subject, "missing", f"{parent} is not writable", f"let this user write to {parent}")]
            return [Finding(subject, "note", "does not exist yet", "vmsnap init makes it")]
        if not self.folder.is_dir():
            return [Finding(subject, "missing", "is not a folder", "choose another path")]
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            return [Finding(subject, "missing", "cannot be read and written", "run as its owner, or change its mode")]
        room = os.statvfs(self.folder)
        if room.f_flag & os.ST_RDONLY:
            return [Finding(subject, "missing", "lies on a read-only file system", "remount it read-write")]
        free = room.f_bavail * room.f_frsize
        severity = "ok" if free >= _LITTLE_BYTES else "note" if free >= _TOO_LITTLE_BYTES else "missing"
        cure = "" if severity == "ok" else "make room: vmsnap prune, or a larger file system"
        findings = [Finding(subject, severity, f"{free // 2**20} MiB free", cure)]
        if self.folder.stat().st_mode & 0o077:
            findings.append(Finding(subject, "note", "other users can look into it", f"chmod 700 {self.folder}"))
        return findings

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)

    def _make_folder(self, folder: Path) -> None:
        """Make `folder` and its missing parents, each durable in its own parent."""
        if folder in self._durable_folders and folder.is_dir():
            return
        if not folder.is_dir():
            if folder != folder.parent:
                self._make_folder(folder.parent)
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                if not folder.is_dir():
                    raise StorageError(f"{folder} is not a folder", cure="choose another path") from None
            sync(folder.parent)
        self._durable_folders.add(folder)

    def _put(self, target: Path, data: bytes | bytearray | memoryview, if_absent: bool) -> None:
        unfinished = self.folder / _UNFINISHED
        self._make_folder(unfinished)
        temporary = unfinished / f"{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # The lock tells a sweep that the writer lives, whatever its PID namespace.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            view = memoryview(data).cast("B")
            with closing(QuietWriter(fd)) as file:
                file.write_all([view], 0)
            os.fsync(fd)
            if len(view) >= _LARGE_OBJECT_BYTES:
                forget(fd)
            if if_absent:
                os.link(temporary, target)
            else:
                temporary.replace(target)
        finally:
            # After a successful replace there is nothing to unlink.
            with suppress(FileNotFoundError):
                temporary.unlink()
            os.close(fd)
        sync(target.parent)

    def _sweep_once(self) -> None:
        with self._lock:
            if self._swept:
                return
            self._swept = True
        self.remove_leftovers()

    def remove_leftovers(self, older_than_seconds: float = _DEAD_AFTER_SECONDS) -> int:
        """Remove temporary files whose writer is dead and that are older than given; returns how many.

        Idempotent, safe beside living writers.

        :raises StorageError: one could not be removed
        """
        removed = 0
        unfinished = self.folder / _UNFINISHED
        try:
            for entry in list(os.scandir(unfinished)) if unfinished.is_dir() else []:
                # Younger ones may belong to a writer that has made the file and not locked it yet.
                if entry.is_file(follow_symlinks=False) and _age(entry) >= older_than_seconds:
                    removed += _remove_unlocked(Path(entry.path))
        except OSError as e:
            raise _storage_error(e, f"cannot clean up {unfinished}") from e
        return removed

    def _list(self, folder: Path, path: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            if path:
                return  # removed by somebody meanwhile
            raise
        names = []
        for entry in entries:
            if not path and entry.name in (_UNFINISHED, "lost+found"):
                continue
            is_folder = entry.is_dir(follow_symlinks=not path)
            # With the slash a folder sorts where its objects' keys do: "a-b" before "a/b" before "a0".
            names.append((path + entry.name + ("/" if is_folder else ""), is_folder, entry))
        for key, is_folder, entry in sorted(names, key=lambda name: name[0]):
            if is_folder:
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._list(Path(entry.path), key, prefix)
            elif key.startswith(prefix):
                with suppress(FileNotFoundError):
                    yield ObjectInfo(key, entry.stat(follow_symlinks=False).st_size)


def _folder_of(url: str) -> Path:
    path = url
    if url.startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UsageError(f"{url!r} names no folder of this host", cure="write file:///folder, or a plain path")
        if parts.query or parts.fragment:
            raise UsageError(f"{url!r} has a '?' or '#'", cure="write %3F or %23, or give a plain path")
        path = unquote(parts.path)
    if not path or "\0" in path:
        raise UsageError(f"{url!r} names no folder", cure="write file:///folder, or a plain path")
    return Path(path).absolute()


def _read_range(fd: int, key: str, offset: int, length: int | None) -> bytes:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise ObjectNotFound(f"{key} is not an object")
    size = found.st_size
    end = size if length is None else offset + length
    if offset > size or end > size:
        raise StorageError(f"{key} has {size} bytes, and {end} were asked for")
    if size < _LARGE_OBJECT_BYTES or end - offset < _LARGE_PART_BYTES:
        content = os.pread(fd, end - offset, offset)
    else:
        with closing(QuietReader(fd)) as reader:
            content = reader.read(offset, end - offset)
    if len(content) != end - offset:
        raise StorageError(f"{key} became shorter while it was read")
    return content


def _age(entry: os.DirEntry[str]) -> float:
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unlocked(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return 0
    finally:
        os.close(fd)
    return 1


def _storage_error(error: OSError, what: str) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageFull(f"{what}: {reason}", cure="free some room, or choose another place")
    return StorageError(f"{what}: {reason}")
