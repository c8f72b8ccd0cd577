"""Names on a server: files get and lose them, folders are made, held, and read."""

from __future__ import annotations

import posixpath
import struct
from collections.abc import Sequence
from contextlib import suppress

from vmsnap_storage_backends.sftp.conversation import Conversation, Refused
from vmsnap_storage_backends.sftp.wire import (
    FSYNC,
    HARDLINK,
    POSIX_RENAME,
    STATVFS,
    Attributes,
    Code,
    Entry,
    Kind,
    Mode,
    attributes,
    free_bytes,
    text,
)

# Folders that are read side by side.
_FOLDERS_AT_ONCE = 64
_FOLDER_MODE = 0o700


class Folder:
    """A folder that is held open, to make durable what is changed in it. Where the server does not let folders be
    opened, or has no fsync, nothing is made durable.
    """

    def __init__(self, talk: Conversation, path: str) -> None:
        """Ask for it; the answer is waited for when it is needed."""
        self._talk = talk
        self._path = path
        self._opening = None
        if FSYNC in talk.extensions:
            self._opening = talk.ask(Kind.OPEN, text(path), struct.pack(">I", Mode.READ), attributes())
        self._handle: bytes | None = None

    def is_missing(self) -> bool:
        """Whether the server has no such folder."""
        if FSYNC not in self._talk.extensions:
            return look(self._talk, self._path) is None
        try:
            self._opened()
        except Refused as e:
            return e.code == Code.NO_SUCH_FILE
        return False

    def sync(self) -> int | None:
        """Ask for the folder to be made durable; None where that cannot be had."""
        with suppress(Refused):
            handle = self._opened()
            return self._talk.ask(Kind.EXTENDED, text(FSYNC), handle) if handle else None
        return None

    def sync_now(self) -> None:
        """Make it durable, where that can be had."""
        syncing = self.sync()
        if syncing is not None:
            # What a server says that cannot sync folders is no reason to fail.
            with suppress(Refused):
                self._talk.answer(syncing)

    def close(self) -> None:
        """Let go of it; idempotent."""
        if self._talk.lost:
            return
        with suppress(Refused):
            handle = self._opened()
            if handle:
                self._talk.forget(self._talk.ask(Kind.CLOSE, handle))
        self._handle = None

    def _opened(self) -> bytes | None:
        if self._opening is not None:
            opening, self._opening = self._opening, None
            self._handle = text(bytes(self._talk.answer(opening).string()))
        return self._handle


def rename(talk: Conversation, source: str, target: str, folder: Folder) -> None:
    """Give `source` the name `target`, in place of what has it; atomic where the server has ``posix-rename``.

    :param folder: that of `target`, which is made durable
    :raises Refused: the server did not do it
    """
    if POSIX_RENAME in talk.extensions:
        _change(talk, folder, talk.ask(Kind.EXTENDED, text(POSIX_RENAME), text(source), text(target)))
        return
    try:
        talk.call(Kind.RENAME, text(source), text(target))
    except Refused:
        # Version 3 renames onto nothing. Between these two there is none of that name.
        remove(talk, target)
        talk.call(Kind.RENAME, text(source), text(target))
    _change(talk, folder)


def link(talk: Conversation, source: str, target: str, folder: Folder) -> None:
    """Give `source` the name `target` too, atomically, if nothing has it.

    :raises Refused: something has it, or the server did not do it
    """
    removing = None
    linking = talk.ask(Kind.EXTENDED, text(HARDLINK), text(source), text(target))
    if talk.in_order:
        removing = talk.ask(Kind.REMOVE, text(source))
    try:
        _change(talk, folder, linking)
    finally:
        if not talk.lost:
            with suppress(Refused):
                talk.answer(talk.ask(Kind.REMOVE, text(source)) if removing is None else removing)


def rename_to_nothing(talk: Conversation, source: str, target: str, folder: Folder) -> None:
    """As `link` for a server without it: looks first, then renames as version 3 does, which most servers refuse where
    something has that name.

    :raises Refused: something has it, or the server did not do it
    """
    if look(talk, target) is not None:
        raise Refused(Code.FAILURE, "it exists")
    _change(talk, folder, talk.ask(Kind.RENAME, text(source), text(target)))


def remove(talk: Conversation, path: str, folder: Folder | None = None) -> None:
    """Remove a file; succeeds where there is none.

    :raises Refused: the server did not do it
    """
    try:
        asked = talk.ask(Kind.REMOVE, text(path))
        if folder is None:
            talk.answer(asked)
        else:
            _change(talk, folder, asked)
    except Refused as e:
        if e.code != Code.NO_SUCH_FILE:
            raise


def _change(talk: Conversation, folder: Folder, change: int | None = None) -> None:
    """Wait for a change in a folder, and make it durable."""
    if change is not None and not talk.in_order:
        talk.answer(change)
        change = None
    syncing = folder.sync()
    try:
        if change is not None:
            talk.answer(change)
    except Refused:
        if syncing is not None:
            talk.forget(syncing)
        raise
    if syncing is not None:
        # What a server says that cannot sync folders is no reason to fail.
        with suppress(Refused):
            talk.answer(syncing)


def look(talk: Conversation, path: str) -> Attributes | None:
    """What the server says of `path`; None where there is nothing.

    :raises Refused: it does not say
    """
    try:
        return talk.call(Kind.STAT, text(path)).attributes()
    except Refused as e:
        if e.code == Code.NO_SUCH_FILE:
            return None
        raise


def make_folder(talk: Conversation, path: str) -> bool:
    """Make a folder; False where something of that name is there.

    :raises Refused: the server did not do it; `Code.NO_SUCH_FILE` where the folder above it is missing
    """
    try:
        talk.call(Kind.MKDIR, text(path), attributes(_FOLDER_MODE))
    except Refused as e:
        if e.code == Code.NO_SUCH_FILE or look(talk, path) is None:
            raise
        return False
    return True


def free_room(talk: Conversation, path: str) -> int | None:
    """How many bytes are free there for this user; None where the server does not say."""
    if STATVFS not in talk.extensions:
        return None
    try:
        return free_bytes(talk.call(Kind.EXTENDED, text(STATVFS), text(path)).rest())
    except Refused:
        return None


def read_folders(talk: Conversation, paths: Sequence[str]) -> list[list[Entry] | None]:
    """The names in each folder, in no order, without ``.`` and ``..``; None for one that is not there.

    :raises Refused: the server did not do it
    """
    found: list[list[Entry] | None] = []
    for at in range(0, len(paths), _FOLDERS_AT_ONCE):
        found += _read_some_folders(talk, paths[at : at + _FOLDERS_AT_ONCE])
    return found


def _read_some_folders(talk: Conversation, paths: Sequence[str]) -> list[list[Entry] | None]:
    opening = [talk.ask(Kind.OPENDIR, text(path)) for path in paths]
    handles: list[bytes | None] = []
    failure: Refused | None = None
    for request in opening:
        try:
            handles.append(text(bytes(talk.answer(request).string())))
        except Refused as e:
            # Something else than a folder may have come into its place; the first folder that is refused tells.
            if e.code != Code.NO_SUCH_FILE and (failure is None):
                failure = e
            handles.append(None)
    found: list[list[Entry] | None] = [None if handle is None else [] for handle in handles]
    left = [number for number, handle in enumerate(handles) if handle is not None]
    try:
        if failure is not None:
            raise failure
        each = 2  # the names of a short folder, and that there are no more
        while left:
            asked = [(number, talk.ask(Kind.READDIR, handles[number] or b"")) for number in left for _ in range(each)]
            ended = _take_names(talk, asked, found)
            left = [number for number in left if number not in ended]
            # What is asked in vain is answered in a few bytes.
            each = min(32, 2 * each, max(2, 256 // max(1, len(left))))
    finally:
        if not talk.lost:
            talk.forget(*(talk.ask(Kind.CLOSE, handle) for handle in handles if handle is not None))
    return found


def _take_names(talk: Conversation, asked: Sequence[tuple[int, int]], found: list[list[Entry] | None]) -> set[int]:
    """Put the names that are answered into the lists of their folders; returns which folders have no more."""
    ended = set()
    failure: Refused | None = None
    for number, request in asked:
        try:
            entries = talk.answer(request).entries()
        except Refused as e:
            failure = failure or (None if e.code == Code.EOF else e)
            ended.add(number)
        else:
            known = found[number]
            if known is not None:
                known += (entry for entry in entries if entry.name not in (".", ".."))
    if failure is not None:
        raise failure
    return ended


def follow_links(talk: Conversation, folder: str, entries: Sequence[Entry]) -> list[Entry]:
    """The names of a folder with what links lead to; those that lead nowhere stay links."""
    asked = {
        entry.name: talk.ask(Kind.STAT, text(posixpath.join(folder, entry.name)))
        for entry in entries
        if entry.attributes.is_link
    }
    found = []
    for entry in entries:
        if entry.name in asked:
            with suppress(Refused):
                found.append(Entry(entry.name, talk.answer(asked[entry.name]).attributes()))
                continue
        found.append(entry)
    return found
