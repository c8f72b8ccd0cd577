"""Memory of another process put together into huge pages: only what is full; and what is learned of pauses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmsnap.errors import VmGone
from vmsnap_drivers.qemu.capture import learned
from vmsnap_drivers.qemu.huge_pages import Survey, collapse, survey
from vmsnap_drivers.qemu.peer import mapped_memory

MIB = 1 << 20
WRITTEN_MIB = 32
OWNER = f"""
import mmap
size = {4 * WRITTEN_MIB} << 20
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(15)  # MADV_NOHUGEPAGE, so that it begins in small pages
for start in range(0, size // 4, 4096):
    memory[start : start + 8] = start.to_bytes(8, "little")  # full
for start in range(size // 4, size // 2, 8 * 4096):
    memory[start] = 1  # one page of eight
for start in range(size // 2, size, 4096):
    memory[start]  # only read: the page of zeros
memory.madvise(14)  # MADV_HUGEPAGE
print("ready", flush=True)
input()
whole = all(memory[s : s + 8] == s.to_bytes(8, "little") for s in range(0, size // 4, 4096))
print(whole and sum(memory[size // 4 :]) == size // 4 // (8 * 4096), flush=True)
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    """A process with 32 MiB of full memory in small pages, and three times as much that is not full."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_what_is_full_is_put_together_and_nothing_else(owner: subprocess.Popen[str]) -> None:
    found = survey(owner.pid)
    assert found.why_not == ""
    assert (WRITTEN_MIB - 4) * MIB <= found.collapsible_bytes <= WRITTEN_MIB * MIB
    before = mapped_memory(owner.pid)
    done = collapse(owner.pid, found, 30.0)
    # A host whose free memory is in small pieces has no huge page to give, and says so.
    assert done.why_not in ("", "the kernel says: Cannot allocate memory")
    if not done.why_not:
        assert done.huge_bytes - before.huge_bytes >= (WRITTEN_MIB - 4) * MIB
        assert survey(owner.pid).collapsible_bytes < 4 * MIB
    assert done.small_bytes + done.huge_bytes <= before.small_bytes + before.huge_bytes + 2 * MIB
    assert owner.communicate("\n")[0] == "True\n"


def test_the_time_is_limited(owner: subprocess.Popen[str]) -> None:
    assert collapse(owner.pid, survey(owner.pid), -1.0).why_not == "the time for it was over"
    assert owner.communicate("\n")[0] == "True\n"


def test_a_process_that_has_ended(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.communicate()
    for call in (survey, mapped_memory):
        with pytest.raises(VmGone):
            call(owner.pid)
    with pytest.raises(VmGone):
        collapse(owner.pid, Survey(0, 0, ()), 1.0)


def test_pauses_that_were_longer_than_predicted_are_expected_next_time(tmp_path: Path) -> None:
    assert learned.factors(tmp_path, "vm001") == {}
    learned.remember(tmp_path, "vm001", "cow", 0.010, 0.040)
    assert learned.factors(tmp_path, "vm001") == {"cow": 2.0}
    learned.remember(tmp_path, "vm001", "cow", 0.020, 0.020)
    assert learned.factors(tmp_path, "vm001") == {"cow": 2.0}
    learned.remember(tmp_path, "vm001", "cow", 0.020, 20.0)
    assert learned.factors(tmp_path, "vm001") == {"cow": 4.0}, "no measurement makes a way impossible"
    learned.remember(tmp_path, "vm001", "precopy", 0.010, 0.010)
    assert learned.factors(tmp_path, "vm001") == {"cow": 2.0, "precopy": 1.0}, "and it is tried again one day"
    (tmp_path / "pauses" / "vm001.json").write_text("{")
    assert learned.factors(tmp_path, "vm001") == {}
