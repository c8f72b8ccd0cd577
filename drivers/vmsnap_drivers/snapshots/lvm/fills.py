"""How full snapshots and pools are, as device mapper tells without taking a lock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fill:
    """How full something is, from 0 to 1; `lost` where it has overflowed."""

    data: float
    metadata: float = 0.0
    lost: bool = False


def parse_status(text: str) -> Mapping[str, Fill]:
    """How full the snapshots and pools in ``dmsetup status`` are, by the names of their devices (the kernel's
    Documentation/admin-guide/device-mapper, snapshot.rst and thin-provisioning.rst).
    """
    found = {}
    for line in text.splitlines():
        device, _, rest = line.partition(": ")
        words = rest.split()
        if words[2:3] == ["snapshot"]:
            used = _ratio(words[3]) if len(words) > 3 else None
            found[device] = Fill(1.0, lost=True) if used is None else Fill(used)
        elif words[2:3] == ["thin-pool"] and len(words) > 5:
            metadata, data = _ratio(words[4]), _ratio(words[5])
            found[device] = Fill(1.0 if data is None else data, 1.0 if metadata is None else metadata)
    return found


def _ratio(text: str) -> float | None:
    used, slash, total = text.partition("/")
    return int(used) / max(1, int(total)) if slash and used.isdecimal() and total.isdecimal() else None
