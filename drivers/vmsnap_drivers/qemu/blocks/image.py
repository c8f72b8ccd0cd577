"""The image files that a snapshot needs, made and looked at with QEMU's own ``qemu-img``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Set
from pathlib import Path
from typing import Any, Final

from vmsnap import durable
from vmsnap.errors import DriverUnavailable, SnapshotError

_QUICK_SECONDS: Final = 30.0
_SLOW_SECONDS: Final = 3600.0
INSTALL: Final = "install qemu-utils, or name it with -o qemu_img=PATH"


class QemuImg:
    """``qemu-img`` as found under `program` (a path, or a name to be looked up in PATH)."""

    def __init__(self, program: str) -> None:
        self._program = program

    def find(self) -> str | None:
        """The path of the program, or None where it is not installed."""
        return shutil.which(self._program)

    def require(self) -> str:
        """Return the path of the program.

        :raises DriverUnavailable: it is not installed
        """
        program = self.find()
        if program is None:
            raise DriverUnavailable(f"{self._program} is not installed", cure=INSTALL)
        return program

    def create(self, path: Path, size_bytes: int, *, owner: tuple[int, int], backing: tuple[str, str] | None) -> None:
        """Create an empty qcow2 image, 0600 and durable, and give it to `owner` (user, group) where we may.

        `backing` (file, format) is written into it and not looked at.

        :raises SnapshotError: it exists already, or cannot be made
        """
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            if os.geteuid() == 0:
                os.chown(path, *owner)
        except OSError as e:
            raise SnapshotError(f"{path} cannot be made: {e.strerror}") from e
        arguments = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=65536"]
        if backing is not None:
            arguments += ["-u", "-b", backing[0], "-F", backing[1]]
        self._run([*arguments, f"{path}", str(size_bytes)], _QUICK_SECONDS)
        sync(path)
        sync(path.parent)

    def check_unused(self, path: Path) -> None:
        """Open `path` alone, with QEMU's locks.

        :raises SnapshotError: a running QEMU has it open for writing, or it is no qcow2 image
        """
        self._run(["info", "--output=json", "-f", "qcow2", str(path)], _QUICK_SECONDS)

    def holds_data(self, overlay: Path) -> bool:
        """Say whether anything was written into `overlay` itself. Neither it nor its base is locked or changed.

        :raises SnapshotError: it cannot be read
        """
        answer = self._run(["map", "--output=json", "-U", "-f", "qcow2", str(overlay)], _QUICK_SECONDS)
        ranges: list[dict[str, Any]] = json.loads(answer)
        return any(found["depth"] == 0 and found.get("present", True) for found in ranges)

    def is_same(self, overlay: Path, base: Path, base_format: str) -> bool:
        """Say whether `overlay` (with `base` behind it) reads as `base` alone does. Reads both.

        :raises SnapshotError: they cannot be read
        """
        arguments = ["compare", "-q", "-f", "qcow2", "-F", base_format, str(overlay), str(base)]
        return not self._call(arguments, _SLOW_SECONDS, accepted=(0, 1)).returncode

    def commit(self, overlay: Path) -> None:
        """Write what `overlay` holds into its base; the overlay stays as it is. Durable on return, idempotent.

        :raises SnapshotError: refused, for example because one of them is in use
        """
        self._run(["commit", "-q", "-d", "-f", "qcow2", str(overlay)], _SLOW_SECONDS)

    def remove_bitmaps(self, path: Path, wanted: Set[str]) -> None:
        """Remove these bitmaps from a qcow2 image that nobody has open; succeeds where they, or the image, are not.

        :raises SnapshotError: it is in use, or no qcow2 image
        """
        if not path.exists():
            return
        described = json.loads(self._run(["info", "--output=json", "-f", "qcow2", str(path)], _QUICK_SECONDS))
        found = described.get("format-specific", {}).get("data", {}).get("bitmaps", [])
        for name in wanted & {bitmap["name"] for bitmap in found}:
            self._run(["bitmap", "--remove", "-f", "qcow2", str(path), name], _QUICK_SECONDS)

    def _run(self, arguments: list[str], timeout_seconds: float) -> str:
        return self._call(arguments, timeout_seconds, accepted=(0,)).stdout

    def _call(
        self, arguments: list[str], timeout_seconds: float, accepted: tuple[int, ...]
    ) -> subprocess.CompletedProcess[str]:
        program = self.require()
        try:
            done = subprocess.run(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise SnapshotError(f"qemu-img {arguments[0]} did not end within {timeout_seconds:g} s") from e
        except OSError as e:
            raise SnapshotError(f"qemu-img could not be run: {e.strerror}") from e
        if done.returncode not in accepted:
            said = " ".join(done.stderr.split()).removeprefix("qemu-img: ")
            raise SnapshotError(f"qemu-img {arguments[0]} failed: {said or f'exit code {done.returncode}'}")
        return done


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk.

    :raises SnapshotError: it could not be written
    """
    try:
        durable.sync(path)
    except OSError as e:
        raise SnapshotError(f"{path} could not be written to its disk: {e.strerror}") from e
