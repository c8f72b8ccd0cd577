"""What a power cut could have left of a folder whose every change was recorded.

The rules are those of POSIX, which promise less than any file system keeps: what was written to a file is there for
sure once an ``fsync`` of the file that began afterwards has ended; its name, once one of its folder has. Everything
else may be there or not: later names without earlier ones, a file's later pages without its earlier ones, a page in
part. Names are kept or lost by chance, but in the order in which they came (as journals of file systems do) unless an
``fsync`` says otherwise.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

_RECORD = struct.Struct("<IIQQQ")
_PAGE_BYTES = 4096
_TIMES_NS = 1_700_000_000_000_000_000
_BETWEEN_NS = 10_000


class Kind(IntEnum):
    """As in between.c."""

    WRITE = 1
    TRUNCATE = 2
    SYNC_BEGINS = 3
    SYNC_ENDS = 4
    CREATE = 5
    LINK = 6
    UNLINK = 7
    RENAME = 8
    MKDIR = 9
    RMDIR = 10
    ZERO = 11


@dataclass(frozen=True)
class Change:
    """One record. `number` is an offset, a length or a token; `data` what was written, the other path, or how much
    became zero.
    """

    kind: Kind
    path: str
    data: bytes
    inode: int
    number: int


def build_library(folder: Path) -> Path:
    """Compile the library that is preloaded."""
    source, library = Path(__file__).with_name("between.c"), folder / "between.so"
    argv = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-std=gnu11", "-o", str(library), str(source)]
    subprocess.run(argv, check=True)
    return library


def recorded_environment(library: Path, folder: Path, log: Path) -> dict[str, str]:
    """The environment of a process that is to be recorded."""
    return {**os.environ, "LD_PRELOAD": str(library), "RECORDED_FOLDER": str(folder), "RECORD_LOG": str(log)}


def read_log(log: Path) -> list[Change]:
    """All changes, the first one first."""
    content = log.read_bytes()
    changes, at = [], 0
    while at < len(content):
        kind, path_bytes, data_bytes, inode, number = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        path = content[at : at + path_bytes].decode()
        at += path_bytes
        changes.append(Change(Kind(kind), path, content[at : at + data_bytes], inode, number))
        at += data_bytes
    return changes


@dataclass
class _File:
    begin: bytes = b""
    changes: list[tuple[int, Change]] = field(default_factory=list)
    durable_before: int = 0
    """Changes with a smaller number are durable."""

    def content(self, chance: random.Random, kept: float, sector_bytes: int) -> bytes:
        content = bytearray(self.begin)
        for number, change in self.changes:
            is_durable = number < self.durable_before
            if change.kind is Kind.TRUNCATE:
                if is_durable or chance.random() < kept:
                    del content[change.number :]
                    content.extend(bytes(change.number - len(content)))
                continue
            for begin, piece in _pages(change):
                if not is_durable and chance.random() >= kept:
                    continue
                if not is_durable and chance.random() < 0.05:
                    piece = piece[: chance.randrange(len(piece) + 1) // sector_bytes * sector_bytes]
                content.extend(bytes(max(0, begin - len(content))))
                content[begin : begin + len(piece)] = piece
        return bytes(content)


def _pages(change: Change) -> Iterator[tuple[int, bytes]]:
    at, data = 0, change.data
    if change.kind is Kind.ZERO:
        data = bytes(int.from_bytes(data, sys.byteorder))
    while at < len(data):
        begin = change.number + at
        length = min(len(data) - at, _PAGE_BYTES - begin % _PAGE_BYTES)
        yield begin, data[at : at + length]
        at += length


def look_at(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is in a folder before anything is recorded: each file's inode and content."""
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


class Disk:
    """The changes, for one cut after another."""

    def __init__(
        self,
        changes: list[Change],
        folder: Path,
        before: Mapping[str, tuple[int, bytes]] | None = None,
        *,
        sector_bytes: int = 1,
    ) -> None:
        """:param folder: the one that was recorded
        :param before: what was in it, see `look_at`; all of it durable
        :param sector_bytes: so much is written whole or not at all
        """
        self._changes = changes
        self._folder = str(folder)
        self._before = dict(before or {})
        self._sector_bytes = sector_bytes

    def cut(self, after: int, chance: random.Random, target: Path) -> None:
        """Make `target` a folder as one could find it after a cut behind so many changes."""
        files: dict[str, _File] = {}
        latest: dict[int, str] = {}
        folders: dict[str, int] = {}
        begun: dict[int, tuple[int, Change]] = {}
        names: list[tuple[int, Change, str]] = []
        begin: dict[str, str] = {}
        for path, (inode, content) in self._before.items():
            begin[path] = latest[inode] = f"{inode}.before"
            files[begin[path]] = _File(content)
            begin |= {str(place): "" for place in Path(path).parents if self._folder in map(str, place.parents)}
        for number, change in enumerate(self._changes[:after]):
            if change.kind is Kind.CREATE:
                # An inode's number comes again when its file is gone.
                latest[change.inode] = f"{change.inode}.{number}"
                files[latest[change.inode]] = _File()
            if change.kind in (Kind.WRITE, Kind.TRUNCATE, Kind.ZERO):
                # A file that somebody made who is not recorded is none of ours.
                if change.inode in latest:
                    files[latest[change.inode]].changes.append((number, change))
            elif change.kind is Kind.SYNC_BEGINS:
                begun[change.number] = (number, change)
            elif change.kind is Kind.SYNC_ENDS:
                since, what = begun.pop(change.number)
                if what.path:
                    folders[what.path] = max(since, folders.get(what.path, 0))
                elif what.inode in latest:
                    file = files[latest[what.inode]]
                    file.durable_before = max(since, file.durable_before)
            else:
                names.append((number, change, latest.get(change.inode, "")))
        tree = _names(names, folders, chance.randrange(after + 1), self._folder, begin)
        kept = chance.choice((0.0, 0.5, 1.0))
        target.mkdir()
        for path in sorted(tree):
            place = target / path.removeprefix(self._folder).lstrip("/")
            if tree[path]:
                file = files[tree[path]]
                place.write_bytes(file.content(chance, kept, self._sector_bytes))
                place.chmod(0o600)
                # Files are as old, among each other, as they were.
                changed = file.changes[-1][0] if file.changes else -1
                os.utime(place, ns=(0, _TIMES_NS + changed * _BETWEEN_NS))
            else:
                place.mkdir(mode=0o700, exist_ok=True)


def _names(
    names: list[tuple[int, Change, str]], folders: dict[str, int], cut: int, top: str, begin: dict[str, str]
) -> dict[str, str]:
    """What is below the folder, where `begin` was: the file behind each name, empty for a folder."""
    true = dict(begin)
    """What was there without the cut: a name that is given to a file is that file's, whether its older one was kept."""
    tree = dict(begin)
    for number, change, file in names:
        new = change.data.decode() if change.kind is Kind.RENAME else change.path
        parents = {place.rpartition("/")[0] for place in (change.path, new)}
        kept = number < cut or any(number < folders.get(parent, 0) for parent in parents)
        if change.kind is Kind.RENAME:
            file = true[change.path]
            assert file, "folders are not renamed"
        for names_now in (true, tree) if kept else (true,):
            if change.kind in (Kind.UNLINK, Kind.RMDIR, Kind.RENAME):
                names_now.pop(change.path, None)
            if change.kind not in (Kind.UNLINK, Kind.RMDIR):
                names_now[new] = file
    # What lies in a folder that is not there is not there.
    return {path: what for path, what in tree.items() if _is_reachable(path, tree, top)}


def _is_reachable(path: str, tree: dict[str, str], top: str) -> bool:
    while (path := path.rpartition("/")[0]) != top:
        if tree.get(path) != "":
            return False
    return True
