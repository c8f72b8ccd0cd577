"""Whether QEMU may write-protect its guest's memory here by userfaultfd, as capture by copy on write needs it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from pathlib import Path
from typing import Final

# include/uapi/linux/userfaultfd.h, and each architecture's unistd.h
_SYSTEM_CALLS: Final = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY: Final = 1
_API: Final = struct.Struct("QQQ")
_UFFDIO_API: Final = 0xC018AA3F
_UFFD_API: Final = 0xAA
_PAGEFAULT_FLAG_WP: Final = 1
_SWITCH: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def why_not(pid: int) -> str:
    """Why the QEMU process `pid` may not protect pages; empty where it may.

    :raises FileNotFoundError: there is no such process
    """
    return why_not_for(Path("/proc", str(pid)).stat().st_uid)


def why_not_for(owner: int) -> str:
    """The same for QEMUs of a user.

    QEMU 7.2 uses the system call (CAP_SYS_PTRACE, or ``vm.unprivileged_userfaultfd=1``), 8.0 and later
    ``/dev/userfaultfd`` first.
    """
    if lacking := what_the_kernel_lacks():
        return lacking
    if owner == 0 or (_SWITCH.exists() and _SWITCH.read_text().strip() == "1"):
        return ""
    device = Path("/dev/userfaultfd")
    if device.exists() and device.stat().st_mode & 0o006 == 0o006:
        return ""
    return f"QEMU runs as user {owner} and may not use userfaultfd (sysctl vm.unprivileged_userfaultfd=1)"


def what_the_kernel_lacks() -> str:
    """Ask the kernel by a userfaultfd of our own, which it gives everybody for their own faults (Linux 5.11); empty
    where it can protect pages, and where it does not let us ask.
    """
    number = _SYSTEM_CALLS.get(platform.machine())
    if number is None:
        return ""
    descriptor = _libc.syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY)
    if descriptor < 0:
        return "this kernel has no userfaultfd" if ctypes.get_errno() == errno.ENOSYS else ""
    try:
        answer = fcntl.ioctl(descriptor, _UFFDIO_API, _API.pack(_UFFD_API, 0, 0))
    finally:
        os.close(descriptor)
    _, features, _ = _API.unpack(answer)
    return "" if features & _PAGEFAULT_FLAG_WP else "this kernel's userfaultfd cannot write-protect pages"
