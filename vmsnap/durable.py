"""Making names and contents outlive a power cut (fsync(2): of a folder, for the names in it)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vmsnap.errors import VmsnapError


def make_folder(folder: Path) -> None:
    """Make the folder, for its owner alone, and the parents that are missing; after a power cut they are there.
    Idempotent; blocks.

    :raises OSError: it cannot be made, or is something else
    """
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync(folder.parent)


def create(path: Path, text: str) -> None:
    """Make a file with that content, 0600, and the folders that are missing; after a power cut it is there. Blocks.

    :raises OSError: it cannot be made, or is there already
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def make_writable_folder(folder: Path) -> None:
    """As `make_folder`, for a folder of vmsnap's state, and see that this user can make files in it. Idempotent;
    blocks.

    :raises VmsnapError: it cannot be made, or not be written to
    """
    try:
        make_folder(folder)
        reason = why_not_writable(folder)
    except OSError as e:
        reason = str(e.strerror)
    if reason:
        raise VmsnapError(
            f"the folder {folder} cannot be written to: {reason}",
            cure="let this user write there, or choose another state folder with --state-dir",
        )


def why_not_writable(folder: Path) -> str:
    """Why this user cannot make files in a folder that is there (access(2)); empty where he can."""
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return ""
    return os.strerror(errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES)


def remove(*paths: Path) -> None:
    """Remove files; a power cut does not bring them back, also where somebody removed them just before. Idempotent;
    blocks.

    :raises OSError: one cannot be removed
    """
    for path in paths:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        if folder.is_dir():
            sync(folder)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk. Blocks.

    :raises OSError: it is not there, or could not be written
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
