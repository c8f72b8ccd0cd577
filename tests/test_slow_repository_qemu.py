"""A repository that takes 1 MB/s does not reach the guest: RAM is in the duplicate, old blocks go beside the disks, and
it runs and writes meanwhile.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine, available_qemus, serial
from tests.left_out import some_of
from tests.world import unguarded
from vmsnap.controller import Controller
from vmsnap.export import export_disks
from vmsnap.host import HostFolders
from vmsnap.places import create_repository, storage_for
from vmsnap.repository import Repository
from vmsnap.roles import StorageBackend
from vmsnap.roles.wrapping import WrappedStorage

pytestmark = pytest.mark.qemu

MIB = 1 << 20
BYTES_PER_SECOND = 1_000_000
SLOW_BYTES = 10 * MIB
"""How much is stored slowly; then the test has seen enough."""
AT, LENGTH = 128 * MIB, 24 * MIB
"""A range of the disks that the guest itself leaves alone."""


class ThrottledStorage(WrappedStorage):
    """Takes 1 MB/s until `SLOW_BYTES` are stored; `begun` and `ended` say when it is slow."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner)
        self.begun, self.ended = threading.Event(), threading.Event()
        self.longest_put_seconds = 0.0
        self._left = SLOW_BYTES
        self._one_at_a_time = threading.Lock()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        with self._one_at_a_time:
            slow = min(len(data), self._left)
            if slow > MIB // 4:
                self.begun.set()
                self.longest_put_seconds = max(self.longest_put_seconds, slow / BYTES_PER_SECOND)
                time.sleep(slow / BYTES_PER_SECOND)
                self._left -= slow
                if self._left <= MIB // 4:
                    self.ended.set()
        super().put(key, data, if_absent=if_absent)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=some_of(available_qemus()[::-1], 2), ids=lambda build: f"qemu{build.version}")
def machine(request: pytest.FixtureRequest, place: Path) -> Iterator[LabMachine]:
    with LabMachine(place / "vm001", request.param, settings={"touch_mib": 24, "stall_us": 500}) as started:
        started.wait_for_check(40, timeout_seconds=150)
        yield started


def fill(machine: LabMachine, pattern: int) -> None:
    """Write to both disks as the guest's devices would, far from what the guest writes itself."""
    for index in range(2):
        path = f"/machine/peripheral/disk{index}/virtio-backend"
        answer = machine.oracle.hmp(f'qemu-io -d {path} "write -P {pattern} {AT} {LENGTH}"')
        assert "rror" not in answer and "failed" not in answer, answer


@pytest.mark.timeout(300)
def test_the_guest_runs_and_writes_while_its_backup_is_stored_slowly(machine: LabMachine, place: Path) -> None:
    fill(machine, 0x11)
    url = str(place / "repository")
    create_repository(url)
    storage = ThrottledStorage(storage_for(url))
    folders = HostFolders.find(place / "state")
    seen: list[str] = []
    fleeces: list[int] = []

    def watch() -> None:
        assert storage.begun.wait(120)
        before = machine.serial_text()
        fill(machine, 0x22)
        fleeces.extend(path.stat().st_blocks * 512 for path in machine.folder.glob("*.before.qcow2"))
        storage.ended.wait(120)
        seen.append(machine.serial_text()[len(before) :])

    watcher = threading.Thread(target=watch)
    with Controller(folders, start_guardian=unguarded) as controller:
        controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        watcher.start()
        result = controller.backup("vm001", Repository.open(storage))
        watcher.join()
    shutil.rmtree(folders.memory_dir)

    (text,) = seen
    assert storage.longest_put_seconds > 4, "the repository was not slow"
    assert len(serial.counts(text)) > 10 and serial.checks(text), "the guest did not go on"
    measured = serial.stalls(text)
    stalls = [serial.longest_stop_seconds(measured), max(stall.longest_us for stall in measured) / 1e6]
    assert max(stalls) < storage.longest_put_seconds / 2, "the guest waited for the repository"
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []

    assert len(fleeces) == 2
    assert all(LENGTH <= size_bytes < 2 * LENGTH for size_bytes in fleeces), "old blocks, each once"
    assert not list(machine.folder.glob("*.before.qcow2"))
    assert result.warnings == ()
    (place / "exported").mkdir()
    for path in export_disks(Repository.open(storage_for(url)), result.backup, place / "exported").values():
        with path.open("rb") as exported:
            exported.seek(AT)
            assert exported.read(LENGTH) == b"\x11" * LENGTH
