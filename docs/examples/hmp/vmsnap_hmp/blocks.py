"""What ``info block`` says of the disks."""

from __future__ import annotations

import re
from pathlib import Path

from vmsnap.errors import HypervisorError
from vmsnap.model import Disk
from vmsnap_hmp.commandline import CommandLine

_DISK = re.compile(r"(?P<device>\S+) \(\S+\): (?P<address>/.+) \((?P<format>\w+)(?P<read_only>, read-only)?.*\)")


def disks_in(answer: str, line: CommandLine) -> tuple[Disk, ...]:
    """The disks that are connected now, in the monitor's order.

    :raises HypervisorError: the image of one cannot be seen
    """
    found = []
    for text in answer.split("\n"):
        match = _DISK.fullmatch(text)
        if match is None:
            continue
        try:
            size = Path(match["address"]).stat().st_size
        except OSError as e:
            raise HypervisorError(f"the image {match['address']} cannot be seen: {e.strerror}") from e
        read_only = match["read_only"] is not None or match["device"] in line.read_only()
        # "plain_file" tells mechanisms that the file holds everything while the VM stands still, and may be copied then
        handle = {"plain_file": "yes"}
        found.append(Disk(match["device"], match["address"], size, match["format"], read_only, handle))
    return tuple(found)
