"""Where vmsnap keeps things on a host: the state folder, guest RAM on tmpfs, and what identifies this boot."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vmsnap.durable import make_folder, why_not_writable
from vmsnap.errors import UsageError, VmsnapError
from vmsnap.roles.options import DriverContext

TMPFS = Path("/dev/shm")


@dataclass(frozen=True)
class HostFolders:
    """The folders of one vmsnap installation on this host; all 0700.

    `state_dir` holds database, locks, logs and what drivers keep; `memory_dir` (tmpfs) holds RAM images of
    duplicates. `spool_dir` is where RAM images may go when tmpfs is too small: guest RAM on a disk, so it is never
    set by itself. `duplicates_dir` is where disks of duplicates go, a folder of the state folder by default.
    """

    state_dir: Path
    memory_dir: Path
    spool_dir: Path | None = None
    memory_budget_bytes: int | None = None
    duplicates_dir: Path | None = None

    @classmethod
    def find(
        cls,
        state_dir: Path | None = None,
        *,
        spool_dir: Path | None = None,
        memory_budget_bytes: int | None = None,
        duplicates_dir: Path | None = None,
    ) -> HostFolders:
        """The folders for `state_dir`, or those of `VMSNAP_STATE_DIR`, or the default of this user; made where missing.

        Each state folder has its own memory folder, so that two installations never see each other's duplicates.

        :raises UsageError: a folder cannot be made or written to, or belongs to somebody else
        """
        if state_dir is None:
            state_dir = default_state_dir()
        state_dir = state_dir.absolute()
        digest = hashlib.blake2b(os.fsencode(state_dir), digest_size=6).hexdigest()
        root = TMPFS if TMPFS.is_dir() else Path(tempfile.gettempdir())
        memory_dir = root / f"vmsnap-{os.getuid()}" / digest
        for folder in (state_dir, memory_dir.parent, memory_dir, *filter(None, (spool_dir, duplicates_dir))):
            _private_folder(folder)
        return cls(state_dir, memory_dir, spool_dir, memory_budget_bytes, duplicates_dir)

    def context(self) -> DriverContext:
        """What drivers are told of this host."""
        return DriverContext(
            self.state_dir, self.memory_dir, self.spool_dir, self.memory_budget_bytes, self.duplicates_dir
        )


def default_state_dir() -> Path:
    """``VMSNAP_STATE_DIR``, else ``/var/lib/vmsnap`` for root and ``$XDG_STATE_HOME/vmsnap`` for others."""
    given = os.environ.get("VMSNAP_STATE_DIR")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/vmsnap")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "vmsnap"


def default_cache_dir() -> Path:
    """``VMSNAP_CACHE_DIR``, else ``/var/cache/vmsnap`` for root and ``$XDG_CACHE_HOME/vmsnap`` for others."""
    given = os.environ.get("VMSNAP_CACHE_DIR")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/cache/vmsnap")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmsnap"


def boot_id() -> str:
    """The kernel's id of this boot (proc(5), /proc/sys/kernel/random/boot_id): what lay in memory is gone when it
    changed.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_start(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot (proc(5), field 22 of /proc/PID/stat); None if there is
    none.

    Together with the pid it names a process for good, although pids are used again. A zombie counts as gone.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _private_folder(folder: Path) -> None:
    try:
        make_folder(folder)
        found = folder.stat()
    except OSError as e:
        raise UsageError(
            f"cannot use the folder {folder}: {e.strerror}", cure="choose another one with --state-dir"
        ) from e
    if found.st_uid != os.geteuid():
        raise UsageError(f"the folder {folder} belongs to another user", cure="choose another one with --state-dir")
    # Searching by the group is the trace of an ACL by which a driver lets its hypervisor's user through to disks.
    if found.st_mode & 0o067:
        try:
            folder.chmod(0o700)
        except OSError as e:
            raise VmsnapError(
                f"the folder {folder} is open to others and cannot be closed: {e.strerror}",
                cure="choose another one with --state-dir",
            ) from e
    if reason := why_not_writable(folder):
        raise UsageError(
            f"the folder {folder} cannot be written to: {reason}", cure="choose another one with --state-dir"
        )
