"""Whether QEMU may write-protect its guest's memory, on this host's kernel; user-mode Linux' is
`tests/in_guest/test_write_protection_lacking.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.consoles import NOBODY, as_nobody
from vmsnap_drivers.qemu import write_protection

pytestmark = pytest.mark.qemu
SWITCH = Path("/proc/sys/vm/unprivileged_userfaultfd")
CURE = "sysctl vm.unprivileged_userfaultfd=1"


def test_this_kernel_can_as_its_own_switch_shows() -> None:
    assert SWITCH.exists()
    assert write_protection.what_the_kernel_lacks() == ""
    assert write_protection.why_not(os.getpid()) == "" or os.geteuid() != 0


def test_what_the_kernel_can_is_known_to_somebody_without_rights() -> None:
    assert as_nobody(write_protection.what_the_kernel_lacks) == ""


def test_a_qemu_of_somebody_else_may_where_the_switch_or_the_device_lets_it() -> None:
    device = Path("/dev/userfaultfd")
    open_to_all = SWITCH.read_text().strip() == "1" or (device.exists() and device.stat().st_mode & 0o006 == 0o006)
    why_not = write_protection.why_not_for(NOBODY)
    assert why_not == ("" if open_to_all else f"QEMU runs as user {NOBODY} and may not use userfaultfd ({CURE})")


def test_a_kernel_without_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of a system call that no kernel has."""
    monkeypatch.setitem(write_protection._SYSTEM_CALLS, "x86_64", 4000)
    assert write_protection.what_the_kernel_lacks() == "this kernel has no userfaultfd"
    assert write_protection.why_not_for(NOBODY) == "this kernel has no userfaultfd"
