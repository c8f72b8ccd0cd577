"""Watches whether a secret comes into sight: in the command line of any process, or in what was left in files."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOOK_EACH_SECONDS = 0.02
_watching: list[tuple[bytes, list[str]]] = []
_is_hooked = False


@contextmanager
def unseen(word: str) -> Iterator[None]:
    """See that no process has that word in its command line meanwhile: those that this one starts are seen whatever
    time they take, all others when they are there for a moment.
    """
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hear)
        _is_hooked = True
    watch: tuple[bytes, list[str]] = (word.encode(), [])
    over, looks = threading.Event(), [0]

    def look() -> None:
        took = 0.0
        while not over.wait(max(_LOOK_EACH_SECONDS, 4 * took)):  # what is watched shall not be held up
            begun = time.monotonic()
            looks[0] += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    _note(watch, path.read_bytes().replace(b"\0", b" "))
                except OSError:
                    continue  # it has ended
            took = time.monotonic() - begun

    thread = threading.Thread(target=look)
    _watching.append(watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _watching.remove(watch)
    assert looks[0] and not watch[1], f"in {looks[0]} looks: {watch[1][:3]}"


def files_with(word: str, *folders: Path) -> list[Path]:
    """The files below folders that have a word in them."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if word.encode() in path.read_bytes()]


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        said = " ".join(map(str, arguments[1])).encode(errors="replace")
        for watch in _watching:
            _note(watch, said)


def _note(watch: tuple[bytes, list[str]], line: bytes) -> None:
    if watch[0] in line:
        watch[1].append(line.decode(errors="replace")[:300])
