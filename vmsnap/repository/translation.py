"""Which chunk of one repository is which of another: ids are keyed, so that the same content has another id in each.

Known for what was copied before. Kept in a local folder, only ever as a cache: sealed by the repository that is copied
to, so that nobody can make it name a wrong chunk; what does not open is thrown away, and what it names is looked for in
the index before it counts.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from vmsnap.repository.format import ID_BYTES
from vmsnap.repository.index import ChunkIndex
from vmsnap.repository.seal import BrokenSeal, Vault

_NAME = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = "unfinished-"
_PAIR_BYTES = 2 * ID_BYTES
_MOST_PAIRS = 1 << 18
_MOST_FILES = 8
_MERGE_AT = 1 << 16

_Words = npt.NDArray[np.uint64]


class Translation:
    """Takes and gives pairs of ids; 64 bytes each. May be used by several threads at once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._recent: dict[bytes, bytes] = {}
        # Sorted by the first eight bytes of the id there, which are as good as random.
        self._theirs: _Words = np.empty((0, 4), np.uint64)
        self._ours: _Words = np.empty((0, 4), np.uint64)

    def __len__(self) -> int:
        return len(self._theirs) + len(self._recent)

    def find(self, ids: Sequence[bytes]) -> list[bytes | None]:
        """The ids that these chunks have here; None for those of which nothing is known."""
        if not ids:
            return []
        with self._lock:
            found = [self._recent.get(each) for each in ids]
            theirs, ours = self._theirs, self._ours
        if len(theirs):
            wanted = np.frombuffer(b"".join(ids), np.uint64).reshape(-1, 4)
            rows = np.minimum(np.searchsorted(theirs[:, 0], wanted[:, 0]), len(theirs) - 1)
            # Of two ids with the same first eight bytes, which are hardly ever met, one is not found.
            for at in np.flatnonzero((theirs[rows] == wanted).all(axis=1)).tolist():
                found[at] = found[at] or ours[rows[at]].tobytes()
        return found

    def add(self, theirs: Sequence[bytes], ours: Sequence[bytes]) -> None:
        """Learn which chunk is which."""
        with self._lock:
            self._recent.update(zip(theirs, ours, strict=True))
            if len(self._recent) > max(_MERGE_AT, len(self._theirs) // 32):
                joined = b"".join(a + b for a, b in self._recent.items())
                self._recent = {}
                self._merge(np.frombuffer(joined, np.uint64).reshape(-1, 8))

    def add_pairs(self, pairs: bytes, known: ChunkIndex) -> None:
        """Learn pairs that were kept, those of chunks that `known` has."""
        words = np.frombuffer(pairs, np.uint64).reshape(-1, 8)
        with self._lock:
            self._merge(words[known.contained(words[:, 4:].tobytes())])

    def pairs(self) -> bytes:
        """All that is known, each id there with the one here behind it."""
        with self._lock:
            recent = b"".join(a + b for a, b in self._recent.items())
            return np.hstack((self._theirs, self._ours)).tobytes() + recent

    def _merge(self, words: _Words) -> None:
        theirs = np.concatenate((self._theirs, words[:, :4]))
        order = np.argsort(theirs[:, 0], kind="stable")
        self._theirs, self._ours = theirs[order], np.concatenate((self._ours, words[:, 4:]))[order]


class TranslationCache:
    """The folder in which a translation is kept, for one pair of repositories: some files of pairs, each sealed.
    Several processes may use it at once. Nothing that fails here fails anything else.
    """

    def __init__(self, folder: Path, vault: Vault, source: str) -> None:
        """No I/O.

        :param folder: for this pair of repositories alone
        :param vault: of the repository that is copied to
        :param source: the id of the one that is copied from
        """
        self._folder = folder
        self._vault = vault
        self._source = source

    def load(self, known: ChunkIndex) -> Translation:
        """What is kept, of the chunks that `known` has. Many small files become few."""
        found = Translation()
        names = [path.name for path in self._files()]
        for name in names:
            if (pairs := self._read(name)) is not None:
                found.add_pairs(pairs, known)
        if len(names) > _MOST_FILES:
            self.save(found.pairs())
            for name in names:
                self._forget(name)
        return found

    def save(self, pairs: bytes) -> None:
        """Keep pairs. Atomic; where there is no room, or no right to write, they are not kept."""
        with suppress(OSError):
            for folder in (*reversed(self._folder.parents), self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            for at in range(0, len(pairs), _MOST_PAIRS * _PAIR_BYTES):
                self._write(secrets.token_hex(16), pairs[at : at + _MOST_PAIRS * _PAIR_BYTES])

    def _files(self) -> list[Path]:
        try:
            found = list(self._folder.iterdir())
        except OSError:
            return []
        for path in found:
            if path.name.startswith(_UNFINISHED) and not Path(f"/proc/{path.name.split('-')[1]}").exists():
                self._forget(path.name)
        return [path for path in found if _NAME.fullmatch(path.name)]

    def _read(self, name: str) -> bytes | None:
        try:
            pairs = self._vault.open_object(self._key(name), (self._folder / name).read_bytes())
        except OSError:
            return None
        except BrokenSeal:
            pairs = b"?"
        if len(pairs) % _PAIR_BYTES:
            self._forget(name)
            return None
        return pairs

    def _write(self, name: str, pairs: bytes) -> None:
        temporary = self._folder / f"{_UNFINISHED}{os.getpid()}-{name}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(self._vault.seal_object(self._key(name), pairs))
            temporary.rename(self._folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _forget(self, name: str) -> None:
        with suppress(OSError):
            (self._folder / name).unlink()

    def _key(self, name: str) -> str:
        return f"translation/{self._source}/{name}"
