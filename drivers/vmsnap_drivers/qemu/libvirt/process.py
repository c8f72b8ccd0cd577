"""The QEMU process of a domain on this host, found past libvirt."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Final

from vmsnap.errors import CannotCapture

_MONITOR_NAME: Final = "monitor.sock"


def find_qemu(uuid: str) -> int:
    """The process that runs the domain of that UUID.

    :raises CannotCapture: there is none on this host, or more than one
    """
    found = process_of(uuid)
    if found is None:
        raise CannotCapture(
            f"no QEMU of domain {uuid} is seen on this host", cure="run vmsnap on the host on which the domain runs"
        )
    return found


def process_of(uuid: str) -> int | None:
    """The process that runs the domain of that UUID, by its command line (``-uuid``, which libvirt always gives); None
    where there is none on this host.

    :raises CannotCapture: there is more than one
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if (b"-uuid", uuid.encode()) in itertools.pairwise(words):
            found.append(int(process.name))
    if len(found) > 1:
        raise CannotCapture(f"several QEMUs of domain {uuid} run on this host: {found}")
    return found[0] if found else None


def monitor_socket(pid: int) -> Path | None:
    """The socket on which the QEMU `pid` listens for libvirtd (``monitor.sock`` in the domain's folder), as seen from
    here, also where libvirtd has a mount namespace of its own. None where it is not found.

    It serves one client: libvirtd, while that lives.
    """
    inodes = set()
    try:
        for descriptor in Path("/proc", str(pid), "fd").iterdir():
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                inodes.add(match[1])
    except OSError:
        return None
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[6] in inodes and Path(words[7]).name == _MONITOR_NAME:
            return Path("/proc", str(pid), "root", words[7].lstrip("/"))
    return None
