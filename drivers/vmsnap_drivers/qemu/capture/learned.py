"""What the last pauses of a VM say of the next: how much longer or shorter they were than predicted.

A host's processors, its load and the VM's devices are in no model. So each way of capture has a factor for each VM,
kept in a file of the driver's state folder, `folder`; one that is lost or damaged is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vmsnap.durable import make_writable_folder
from vmsnap.model import check_name, from_json, to_json
from vmsnap_drivers.qemu.smallfile import write_whole

_LEAST: Final = 0.25
_MOST: Final = 4.0


def factors(folder: Path, vm: str) -> Mapping[str, float]:
    """By what the prediction for each way of capture is to be multiplied; 1 for ways that are not in it."""
    try:
        return from_json(_place(folder, vm).read_text(), dict[str, float])
    except (FileNotFoundError, ValueError):
        return {}


def remember(folder: Path, vm: str, capture: str, predicted_seconds: float, measured_seconds: float) -> None:
    """Take a measurement in: the factor goes half the way, on the scale of ratios, as one pause may have been
    disturbed. The factors of the other ways go half the way back to 1, so that a way that was slow once is tried again.

    `predicted_seconds` is with the factor.

    :raises VmsnapError: its folder cannot be written to
    """
    known = {way: factor**0.5 for way, factor in factors(folder, vm).items() if way != capture}
    factor = factors(folder, vm).get(capture, 1.0) * (measured_seconds / predicted_seconds) ** 0.5
    known[capture] = min(_MOST, max(_LEAST, factor))
    place = _place(folder, vm)
    make_writable_folder(place.parent)
    write_whole(place, to_json(known))


def _place(folder: Path, vm: str) -> Path:
    return folder / "pauses" / f"{check_name(vm, 'VM name')}.json"
