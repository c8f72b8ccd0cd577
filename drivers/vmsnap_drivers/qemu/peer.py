"""The QEMU process behind a monitor, seen from ``/proc``: its command line, environment, memory."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import CannotCapture, HypervisorError, VmGone
from vmsnap_drivers.qemu.unix_socket import connect_unix

_KEPT_VARIABLES: Final = (
    "LD_LIBRARY_PATH",
    "QEMU_MODULE_DIR",
    "QEMU_AUDIO_DRV",
    "LD_PRELOAD",
    "PATH",
    "LANG",
    "LC_ALL",
)
"""What a second QEMU may need to be the same as the first; nothing else of an environment is looked at, as secrets may
stand in it.
"""

_TMPFS: Final = frozenset({"tmpfs", "ramfs"})
RAM_AT_LEAST_BYTES: Final = 16 * 1024 * 1024
"""A mapping of this size or more counts as guest RAM."""
_EFFECTIVE: Final = re.compile(r"^(Uid|Gid):\t\d+\t(\d+)\t", re.MULTILINE)
_UCRED: Final = struct.Struct("3i")
_CONNECT_SECONDS: Final = 1.0
_LOOK_EACH_SECONDS: Final = 0.01
_LISTENING: Final = 0x10000
"""``__SO_ACCEPTCON`` among the flags in /proc/net/unix (the kernel's ``include/uapi/linux/net.h``)."""


@dataclass(frozen=True)
class Peer:
    """A QEMU process. Made by :func:`look_at`."""

    pid: int
    exe: str
    cwd: str
    argv: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Mapping:
    """One mapping of a process, as ``/proc/PID/smaps`` shows it.

    :ivar is_private_data: private, readable and writable, and of no file: anonymous memory
    :ivar small_bytes: in memory, in pages of the processor's smallest size
    :ivar huge_bytes: in memory, in huge pages
    """

    start: int
    end: int
    is_private_data: bool
    small_bytes: int
    huge_bytes: int

    @property
    def size_bytes(self) -> int:
        """Its length, in memory or not."""
        return self.end - self.start


@dataclass(frozen=True)
class MappedMemory:
    """What of a process's large anonymous and shared mappings, its guest RAM, is in memory.

    :ivar small_bytes: in pages of the processor's smallest size
    :ivar huge_bytes: in huge pages
    """

    small_bytes: int
    huge_bytes: int


def look_at(pid: int) -> Peer:
    """Read what ``/proc`` shows of a process.

    :raises VmGone: it has ended
    :raises CannotCapture: it belongs to somebody else
    """
    folder = Path("/proc", str(pid))
    try:
        argv = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        exe = str((folder / "exe").readlink())
        cwd = str((folder / "cwd").readlink())
        environment = _environment(folder)
    except (FileNotFoundError, ProcessLookupError) as e:
        raise VmGone(f"the QEMU process {pid} has ended") from e
    except PermissionError as e:
        raise CannotCapture(f"the QEMU process {pid} belongs to another user", cure="run vmsnap as root") from e
    return Peer(pid, exe.removesuffix(" (deleted)"), cwd, tuple(os.fsdecode(word) for word in argv), environment)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the host's; with the pid it names a process for good. None where
    there is no such process, or only its zombie.
    """
    try:
        text = Path("/proc", str(pid), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def user_of(pid: int) -> tuple[int, int]:
    """The user and the group as which a process opens files (``Uid:`` and ``Gid:`` in /proc/PID/status, proc(5)).

    :raises VmGone: it has ended
    """
    try:
        text = Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError) as e:
        raise VmGone(f"the QEMU process {pid} has ended") from e
    found = {name: int(effective) for name, effective in _EFFECTIVE.findall(text)}
    return found["Uid"], found["Gid"]


def started_at(pid: int) -> float:
    """When a process started, in seconds since 1970, to one second; 0 where there is no such process."""
    found = re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    ticks = start_time(pid)
    return int(found[1]) + ticks / os.sysconf("SC_CLK_TCK") if found and ticks is not None else 0.0


def listener(path: Path) -> int | None:
    """The process that listens on a UNIX socket, whether it answers or not; None where nobody does.

    :raises HypervisorError: it cannot be told
    """
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_CONNECT_SECONDS)
            try:
                connect_unix(client, path)
                return int(_UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            except OSError as e:
                # A full backlog (EAGAIN, or the time-out): a QEMU that hangs, or one that is about to be gone.
                pid = _holder_of_listening(path)
                if pid is not None:
                    return pid
                if time.monotonic() > deadline:
                    raise HypervisorError(f"whether somebody listens on {path} cannot be told: {e}") from e
        time.sleep(_LOOK_EACH_SECONDS)


def _holder_of_listening(path: Path) -> int | None:
    """Who has the socket open that listens on `path`, by /proc/net/unix (proc(5)); None where nobody is seen."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENING and fields[7] == str(path.absolute()):
            inodes.add(f"socket:[{fields[6]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(descriptor.readlink()) in inodes for descriptor in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
    return None


def mapped_memory(pid: int) -> MappedMemory:
    """Sum up the process's mappings of 16 MiB and more. Takes some milliseconds a GiB of small pages.

    :raises VmGone: it has ended
    """
    large = [mapping for mapping in mappings(pid) if mapping.size_bytes >= RAM_AT_LEAST_BYTES]
    return MappedMemory(sum(m.small_bytes for m in large), sum(m.huge_bytes for m in large))


def thread_waiting_on(pid: int, inode: int) -> bool:
    """Whether a thread of the process stands in a system call on the socket `inode`.

    :raises PermissionError: this user may not look
    """
    tasks = Path("/proc", str(pid), "task")
    target = f"socket:[{inode}]"
    for task in tasks.iterdir():
        try:
            words = (task / "syscall").read_text().split()
            if len(words) < 3 or int(words[1], 16) > 1_000_000:
                continue
            if str(Path("/proc", str(pid), "fd", str(int(words[1], 16))).readlink()) == target:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def file_system_of(path: Path) -> str:
    """Type of the file system that `path` (or the nearest folder above it that exists) lies on, such as ``tmpfs``."""
    while not path.exists() and path != path.parent:
        path = path.parent
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return "unknown"


def is_memory_file_system(kind: str) -> bool:
    """Whether files on a file system of this kind are pages of memory and nothing else."""
    return kind in _TMPFS or kind == "hugetlbfs"


def available_memory_bytes() -> int:
    """What the host can still give out without swapping, by its own estimate."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def boot_id() -> str:
    """What tells this start of the host from any other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _environment(folder: Path) -> dict[str, str]:
    kept: dict[str, str] = {}
    for entry in (folder / "environ").read_bytes().split(b"\0"):
        name, _, value = os.fsdecode(entry).partition("=")
        if name in _KEPT_VARIABLES:
            kept[name] = value
    return kept


def mappings(pid: int) -> list[Mapping]:
    """All mappings of a process. Takes some milliseconds a GiB of small pages.

    :raises VmGone: it has ended
    """
    try:
        text = Path("/proc", str(pid), "smaps").read_text()
    except (FileNotFoundError, ProcessLookupError) as e:
        raise VmGone(f"the QEMU process {pid} has ended") from e
    found: list[tuple[list[str], dict[str, int]]] = []
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if " " in name or not colon:
            found.append((line.split(), {}))
        elif rest.endswith(" kB"):
            found[-1][1][name] = int(rest.split()[0]) * 1024
    return [_mapping(words, fields) for words, fields in found]


def _mapping(words: list[str], fields: dict[str, int]) -> Mapping:
    start, _, end = words[0].partition("-")
    huge = sum(fields.get(name, 0) for name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"))
    # Pages of hugetlbfs do not count as resident.
    small = max(0, fields.get("Rss", 0) - huge)
    huge += fields.get("Private_Hugetlb", 0) + fields.get("Shared_Hugetlb", 0)
    return Mapping(int(start, 16), int(end, 16), words[1] == "rw-p" and words[4] == "0", small, huge)
