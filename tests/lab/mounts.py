"""Mounts that no other process of this host sees: whoever copies all mounts for himself keeps them busy
(``unshare --mount``, as the lab's libvirtd and SSH servers are started).
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNS = 0x20000


@contextlib.contextmanager
def own_mounts() -> Iterator[None]:
    """In here this thread, and what it starts, has a mount namespace of its own (unshare(2)). Needs root."""
    folder = Path.cwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _checked(libc.unshare(_CLONE_NEWNS), "unshare")
        try:
            subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=60)
            yield
        finally:
            _checked(libc.setns(before, _CLONE_NEWNS), "setns")
            os.chdir(folder)
    finally:
        os.close(before)


def _checked(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
