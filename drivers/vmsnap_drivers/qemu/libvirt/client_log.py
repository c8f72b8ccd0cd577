"""What libvirt's library says on this side: warnings, which it would write to standard error, between lines of ours.

Why a certificate was not accepted stands there alone, its error says only that it was not
(``virNetTLSContextCheckCertificate``, ``src/rpc/virnettlscontext.c``, 9.0). The library is told where to write by its
environment, once, when it is loaded (libvirt's ``docs/logging.rst``).
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Final

_VARIABLES: Final = ("LIBVIRT_LOG_OUTPUTS", "LIBVIRT_DEBUG")
_WARNINGS: Final = 3
_REASON: Final = re.compile(r" : Certificate check failed (.*)$", re.MULTILINE)
_logs: list[int] = []


def load() -> Any:
    """The module `libvirt`, imported when first needed; what it warns of is kept in memory then, unless the user has
    said where it goes.

    :raises ImportError: it cannot be loaded
    """
    if "libvirt" in sys.modules or any(os.environ.get(variable) for variable in _VARIABLES):
        import libvirt

        return libvirt
    log = os.memfd_create("vmsnap-libvirt-log")
    os.environ["LIBVIRT_LOG_OUTPUTS"] = f"{_WARNINGS}:file:/proc/self/fd/{log}"
    try:
        import libvirt
    finally:
        del os.environ["LIBVIRT_LOG_OUTPUTS"]
    _logs.append(log)
    return libvirt


def why_certificate_failed() -> str:
    """Why the last certificate that was looked at was not accepted; empty where that is not known."""
    found = [reason for log in _logs for reason in _REASON.findall(_text(log))]
    return found[-1].strip() if found else ""


def _text(log: int) -> str:
    """All that was written since the last look, which is forgotten."""
    text = os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")
    os.ftruncate(log, 0)
    return text
