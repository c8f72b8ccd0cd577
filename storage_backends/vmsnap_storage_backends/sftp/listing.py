"""The objects below a folder of a server, in order, with few round trips and without holding them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vmsnap.roles.storage import ObjectInfo
from vmsnap_storage_backends.sftp.wire import Entry

# Folders whose names are held at once.
_FOLDERS_AT_ONCE = 64

ReadFolders = Callable[[Sequence[str]], Sequence[Sequence[Entry] | None]]
"""Gives the names in each of these folders, links at the top followed; None for one that is not there."""


class Listing:
    """Walks a tree of folders."""

    def __init__(self, root: str, hidden: Sequence[str], read_folders: ReadFolders) -> None:
        """:param hidden: names in `root` that are not shown"""
        self._root = root
        self._hidden = hidden
        self._read_folders = read_folders

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in ascending order of keys.

        :raises FileNotFoundError: there is no root
        """
        # What lies beside the folders that the prefix names need not be read.
        folder = prefix[: prefix.rfind("/") + 1]
        if folder and any(word in ("", ".", "..") for word in folder[:-1].split("/")):
            folder = ""
        (entries,) = self._read_folders([self._at(folder)])
        if entries is None:
            if folder:
                return
            raise FileNotFoundError(self._root)
        yield from self._walk(folder, entries, prefix)

    def _at(self, folder: str) -> str:
        return f"{self._root}/{folder}".rstrip("/") if folder else self._root

    def _walk(self, path: str, entries: Sequence[Entry], prefix: str) -> Iterator[ObjectInfo]:
        names = []
        for entry in entries:
            if path or entry.name not in self._hidden:
                # With the slash a folder sorts where its objects' keys do: "a-b" before "a/b" before "a0".
                key = path + entry.name + ("/" if entry.attributes.is_folder else "")
                if key.startswith(prefix) or (key.endswith("/") and prefix.startswith(key)):
                    names.append((key, entry))
        names.sort(key=lambda name: name[0])
        folders = [key for key, entry in names if entry.attributes.is_folder]
        known: dict[str, Sequence[Entry] | None] = {}
        for key, entry in names:
            if not entry.attributes.is_folder:
                yield ObjectInfo(key, entry.attributes.size_bytes or 0)
                continue
            if key not in known:
                at = folders.index(key)
                wanted = folders[at : at + _FOLDERS_AT_ONCE]
                known = dict(zip(wanted, self._read_folders([self._at(each) for each in wanted]), strict=True))
            below = known.pop(key)
            if below is not None:  # removed by somebody meanwhile
                yield from self._walk(key, below, prefix)
