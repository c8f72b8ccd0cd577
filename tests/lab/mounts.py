"""Mounts that no other process of this host sees: whoever copies all mounts for himself keeps them busy
(``unshare --mount``, as the lab's libvirtd and SSH servers are started).
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000


@contextlib.contextmanager
def own_mounts(*, shared: bool = False) -> Iterator[None]:
    """In here this thread, and what it starts, has a mount namespace of its own (unshare(2)). Needs root.

    :param shared: what is mounted in here is then mounted also in those namespaces that are copies of this one, where
        they want it (``unshare --propagation slave``), as it would be on a host
    """
    folder = Path.cwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _checked(libc.unshare(_CLONE_NEWNS), "unshare")
        try:
            subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=60)
            if shared:
                subprocess.run(["mount", "--make-rshared", "/"], check=True, timeout=60)
            yield
        finally:
            # Threads that were begun in here and live on, such as libvirt's, share what setns(2) wants for itself.
            _checked(libc.unshare(_CLONE_FS), "unshare")
            _checked(libc.setns(before, _CLONE_NEWNS), "setns")
            os.chdir(folder)
    finally:
        os.close(before)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """In here nobody can write into the folder, not even root, who heeds no modes. Needs root."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True, timeout=60)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, timeout=60)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=60)


def _checked(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
