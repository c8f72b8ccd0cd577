"""What a device state, which QEMU alone can read, tells without being understood: the names of its sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_SLIRP: Final = re.compile(rb"\x04.{4}\x05slirp\x00\x00\x00(.)", re.DOTALL)
"""A full section (4), its number, length and name of its device, the device's instance (``save_section_header``,
``migration/savevm.c``, QEMU 7.2 and 10.0)."""


def slirp_instances(path: Path) -> tuple[int, ...]:
    """The instances of networks of type ``user`` (``net/slirp.c``) in a device state, ascending, which is the order in
    which they were made.
    """
    return tuple(sorted({found[1][0] for found in _SLIRP.finditer(path.read_bytes())}))
