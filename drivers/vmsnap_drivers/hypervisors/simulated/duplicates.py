"""Duplicates in host memory: one folder each, with the RAM image, the device state, and who fills it.

``vmsnap-simulated.json`` names the VM and is locked by the process that copies the RAM, for as long as it copies;
``device.json`` appears, by a rename, when the copy is complete; ``finished`` when the backup has taken it over.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsnap.errors import AlreadyExists, HypervisorError
from vmsnap_drivers.hypervisors.simulated.layout import PAGE
from vmsnap_drivers.hypervisors.simulated.lock import is_locked, try_lock

MARKER = "vmsnap-simulated.json"
RAM_IMAGE = "ram.img"
DEVICE_STATE = "device.json"
FAILURE = "failed"
FINISHED = "finished"
_CHUNK = 1 << 20
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class DuplicateFolder:
    """The folder of one duplicate."""

    path: Path

    @property
    def ram_image(self) -> Path:
        """The RAM, byte for byte."""
        return self.path / RAM_IMAGE

    @property
    def device_state(self) -> Path:
        """Registers and devices; exists when everything has been copied."""
        return self.path / DEVICE_STATE

    def create(self, vm: str) -> None:
        """Make the folder for a duplicate of `vm`.

        :raises AlreadyExists: there is one
        """
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise AlreadyExists(f"a duplicate {self.path.name!r} exists in {self.path.parent}") from None
        descriptor = os.open(self.path / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps({"vm": vm, "pid": 0}).encode())
        finally:
            os.close(descriptor)

    def marker(self) -> dict[str, Any] | None:
        """Whose duplicate it is and who fills it; None when the folder is no duplicate of ours."""
        try:
            values: dict[str, Any] = json.loads((self.path / MARKER).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return {"vm": "", "pid": 0}
        return values

    def filling(self) -> bool:
        """Whether a process copies into it."""
        return is_locked(self.path / MARKER)

    @property
    def finished(self) -> bool:
        """Whether it is whole and was taken over."""
        return (self.path / FINISHED).exists()

    def failure(self) -> str:
        """Why the copying failed, as far as it could say."""
        with contextlib.suppress(FileNotFoundError):
            return (self.path / FAILURE).read_text()
        return "the copying process was ended"

    def finish(self) -> None:
        """Mark it as taken over."""
        os.close(os.open(self.path / FINISHED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def copied_bytes(self) -> int:
        """How much RAM has been copied so far."""
        try:
            return self.ram_image.stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def remove(self, timeout_seconds: float) -> None:
        """End who copies into it, and remove it; succeeds where there is nothing.

        :raises HypervisorError: the copying process does not end
        """
        deadline = time.monotonic() + timeout_seconds
        while self.filling():
            marker = self.marker()
            if marker is not None and marker["pid"] and self.filling():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(marker["pid"], signal.SIGKILL)
            if time.monotonic() > deadline:
                raise HypervisorError(f"the process that fills duplicate {self.path.name!r} does not end")
            time.sleep(_POLL_SECONDS)
        if self.marker() is not None or not any(self.path.glob("*")):
            # the marker goes last, so that an interrupted removal is found again
            for path in sorted(self.path.glob("*"), key=lambda path: path.name == MARKER):
                path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.path.rmdir()


def duplicates_in(folder: Path) -> Iterator[tuple[DuplicateFolder, str]]:
    """Every duplicate of ours in this folder, with the name of its VM."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        duplicate = DuplicateFolder(path)
        marker = duplicate.marker()
        if marker is not None:
            yield duplicate, marker["vm"]


def lock_for_copying(folder: DuplicateFolder) -> int:
    """Lock the marker; the descriptor is left to the process that copies, and with it the lock.

    :raises OSError: the folder was not prepared
    :raises HypervisorError: somebody copies into it already
    """
    descriptor = os.open(folder.path / MARKER, os.O_RDWR | os.O_CLOEXEC)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise HypervisorError(f"somebody copies into {folder.path} already")
    return descriptor


def announce(marker: int) -> None:
    """Say that this process copies, so that it can be ended."""
    # never shorter than what stands there, so that no reader finds half of it
    os.pwrite(marker, json.dumps({**json.loads(os.pread(marker, PAGE, 0)), "pid": os.getpid()}).encode(), 0)


def copy_into(folder: DuplicateFolder, ram: mmap.mmap, device_state: dict[str, Any]) -> None:
    """Write RAM (its zero pages skipped) and device state; runs in the fork, whose RAM does not change any more.

    :raises OSError: no room, or the folder is gone
    """
    descriptor = os.open(folder.ram_image, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.ftruncate(descriptor, len(ram))
    for offset, length in runs_of_data(ram):
        with memoryview(ram) as view:
            written = 0
            while written < length:
                written += os.pwrite(descriptor, view[offset + written : offset + length], offset + written)
    os.close(descriptor)
    partial = folder.device_state.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.write(descriptor, json.dumps(device_state).encode())
    os.close(descriptor)
    partial.rename(folder.device_state)


def runs_of_data(ram: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Offset and length of each run of pages that are not all zeros, no run longer than a chunk."""
    zero_chunk, zero_page = bytes(_CHUNK), bytes(PAGE)
    for start in range(0, len(ram), _CHUNK):
        chunk = ram[start : start + _CHUNK]
        if chunk == zero_chunk[: len(chunk)]:
            continue
        begin = -1
        for at in range(0, len(chunk), PAGE):
            if chunk[at : at + PAGE] == zero_page:
                if begin >= 0:
                    yield start + begin, at - begin
                begin = -1
            elif begin < 0:
                begin = at
        if begin >= 0:
            yield start + begin, len(chunk) - begin


def read_ram_image(path: Path, size_bytes: int) -> mmap.mmap:
    """Map a RAM image copy on write: pages come when they are touched, and the file stays as it is.

    :raises HypervisorError: the file is missing or has another size
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise HypervisorError(f"cannot open RAM image {path}: {e.strerror}") from e
    try:
        found = os.fstat(descriptor).st_size
        if found != size_bytes:
            raise HypervisorError(f"RAM image {path} has {found} bytes, not {size_bytes}")
        return mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
