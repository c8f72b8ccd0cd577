"""`Qcow2Target`: a qcow2 image that a backup is written onto, through QEMU's own qemu-nbd, which locks it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vmsnap.errors import Busy, NotFound, StorageError, UsageError, VmsnapError
from vmsnap.imagelock import refuse_loop_file
from vmsnap.nbdtarget import NbdTarget, tool


def create_qcow2(path: Path, size_bytes: int) -> None:
    """Make an empty image, readable by its owner alone. Blocks.

    :raises DriverUnavailable: qemu-img is not installed
    :raises StorageError: it cannot be made
    """
    command = [tool("qemu-img"), "create", "-q", "-f", "qcow2", str(path.absolute()), str(size_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode:
        raise StorageError(f"qemu-img could not make {path}: {' '.join(done.stderr.split())}")


class Qcow2Target(NbdTarget):
    """A qcow2 file."""

    def __init__(self, path: Path) -> None:
        """Start qemu-nbd on the image and connect; changes nothing. Blocks.

        :raises NotFound: there is no such file
        :raises UsageError: it is no plain file, or no qcow2 image
        :raises Busy: somebody uses it
        :raises DriverUnavailable: qemu-nbd is not installed
        :raises StorageError: qemu-nbd cannot open it
        """
        program = tool("qemu-nbd")
        _check_file(path)
        # Without the host's page cache, where the file system can.
        cache = "none" if _takes_direct(path) else "writeback"
        opening = ["--format=qcow2", f"--cache={cache}", "--discard=unmap", "--", str(path.absolute())]
        super().__init__(str(path), str(path.absolute()), program, opening)

    def refusal(self, said: str) -> VmsnapError:
        """See `NbdTarget.refusal`."""
        if "lock" in said:
            return Busy(f"{self.label} is in use: QEMU or one of its tools holds it", cure="stop the VM first")
        return StorageError(f"qemu-nbd cannot open {self.label}: {said or 'it does not say why'}")

    def cure_of_size(self, size_bytes: int) -> str:
        """See `NbdTarget.cure_of_size`."""
        return f"qemu-img resize gives it {size_bytes} bytes"


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            if not path.exists():
                raise NotFound(f"there is no {path}", cure="vmsnap export --output makes new files")
            raise UsageError(f"{path} is no plain file", cure="qcow2 images on block devices are not written")
        with path.open("rb") as file:
            if not is_qcow2(file.read(4)):
                raise UsageError(f"{path} is no qcow2 image", cure="--format raw writes raw images")
    except OSError as e:
        raise StorageError(f"cannot open {path}: {e.strerror}") from e
    refuse_loop_file(path)


def is_qcow2(begin: bytes) -> bool:
    """Say whether a file that begins so is a qcow2 image."""
    return begin.startswith(b"QFI\xfb")


def _takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True
