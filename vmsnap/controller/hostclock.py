"""Whether somebody keeps this host's clock right, as the kernel knows it."""

from __future__ import annotations

import ctypes
from typing import Final

_TIME_ERROR: Final = 5
_TIMEX_BYTES: Final = 512
"""More than ``struct timex`` has on any machine; all zero, it asks and changes nothing (adjtimex(2))."""


def is_synchronised() -> bool:
    """Whether the kernel says so; it does where an NTP client has set the clock in the last hours.

    :raises OSError: the kernel does not tell
    """
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return bool(state != _TIME_ERROR)
