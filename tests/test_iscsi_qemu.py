"""The patent's scenario on a tgtd of the host: a real guest whose disks are LUNs that its QEMU reaches by its own
initiator with an account of CHAP, backed up with the snapshots exported as targets of their own, and its duplicate on
LUNs of its own, which it reaches by the same account.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import disk_records, ext4, find_qemu, serial
from tests.lab.tgtd import TargetServer, programs
from tests.qemu_stage import MIB, Stage, read_ledger, staged
from tests.secrets_in_sight import files_with, unseen
from tests.test_failover_qemu import goes_on
from tests.test_file_mechanism import xfs
from tests.test_live_backup_qemu import block_graph, processes_of, text_after_two_checks
from vmsnap.controller.results import RestoreResult
from vmsnap.database import FILE_NAME
from vmsnap.errors import AlreadyExists, Busy, HypervisorError, NotFound, UsageError
from vmsnap.model import VmState

__all__ = ["xfs"]
pytestmark = [pytest.mark.qemu, pytest.mark.lab, pytest.mark.timeout(900)]

TARGETS = ("iqn.2009-12.com.example:001", "iqn.2009-12.com.example:001-data")
USER, WORD = "keeper", "a word of chap 12"


class Bench:
    """A guest on LUNs, the server of these, and the folder of their backing stores."""

    def __init__(self, stage: Stage, server: TargetServer, images: Path) -> None:
        self.stage = stage
        self.server = server
        self.images = images

    def see_that_nothing_is_left(self) -> None:
        assert sorted(self.server.targets()) == sorted(TARGETS)
        assert sorted(path.name for path in self.images.iterdir()) == ["disk0.img", "disk1.img"]
        assert self.stage.left() == []
        assert self.stage.controller.journal.unfinished() == []

    def row(self, vm: str) -> dict[str, str]:
        """The VM table's virtual disk identifiers and physical disk addresses."""
        rows = {row.vm: row for row in self.stage.controller.table.rows()}
        return {disk.device: disk.address for disk in rows[vm].disks}


@pytest.fixture(scope="module")
def bench(xfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    images = xfs / "luns"
    images.mkdir()
    with (images / "disk0.img").open("wb") as file:
        file.truncate(256 * MIB)
    ext4.make_ext4(images / "disk1.img", 64 * MIB)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{programs()}:{path}"
    try:
        with TargetServer(tmp_path_factory.mktemp("tgtd")) as server:
            for index, target in enumerate(TARGETS):
                server.add(target, images / f"disk{index}.img", user=USER, password=WORD)
            first, second = map(server.address, TARGETS)
            secret = tmp_path_factory.mktemp("secret") / "word"
            secret.write_text(WORD)
            chap = {"chap_user": USER, "chap_password_file": str(secret)}
            options = {"iscsi": {**server.options, "reading": "initiator", **chap}}
            with staged(find_qemu("7.2"), (first, second), options, (USER, secret)) as stage:
                yield Bench(stage, server, images)
    finally:
        os.environ["PATH"] = path
    shutil.rmtree(images)


@pytest.fixture(autouse=True)
def no_secret_comes_into_sight(bench: Bench, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """In no command line, while LUNs are exported, read, written onto, and reached by duplicates; and in nothing that
    is left of it: state, journal, logs.
    """
    caplog.set_level("DEBUG")
    with unseen(WORD):
        yield
    folders = bench.stage.controller.folders
    assert (folders.state_dir / FILE_NAME).exists()
    assert files_with(WORD, folders.state_dir) == [] and WORD not in caplog.text


def test_a_live_backup_is_read_from_targets_of_its_own_and_comes_to_life_beside_the_original(bench: Bench) -> None:
    stage, machine = bench.stage, bench.stage.machine
    graph, processes, stops = block_graph(machine), processes_of(stage.place), stage.stops()
    result = stage.controller.backup("vm001", stage.repository)
    assert [disk.mechanism for disk in stage.controller.table.get("vm001").disks] == ["iscsi", "iscsi"]
    assert bench.row("vm001") == {"disk0": bench.server.address(TARGETS[0]), "disk1": bench.server.address(TARGETS[1])}
    assert stage.stops()[len(stops) :] == ["STOP", "RESUME"]
    assert block_graph(machine) == graph and processes_of(stage.place) == processes
    bench.see_that_nothing_is_left()
    verified = stage.controller.verify_boot(stage.repository, result.backup, timeout_seconds=200)
    assert "serial" in verified.life
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == [] and stage.bridge.repeated() == set()


def test_two_mechanisms_of_one_vm_work_inside_one_pause(bench: Bench) -> None:
    """One disk by QEMU's block layer, one in the target: RAM and both disks agree in what is brought to life."""
    stage, machine = bench.stage, bench.stage.machine
    graph, stops, reach = block_graph(machine), stage.stops(), {"qmp": str(machine.qmp_socket)}
    stage.controller.remove_vm("vm001")
    stage.controller.add_vm("vm001", "qemu", reach, {"disk0": "qcow2"})
    result = stage.controller.backup("vm001", stage.repository)
    assert stage.stops()[len(stops) :] == ["STOP", "RESUME"]
    manifest = stage.repository.manifest(result.backup)
    assert [(disk.device, disk.mechanism) for disk in manifest.disks] == [("disk0", "qcow2"), ("disk1", "iscsi")]
    taken = [moment for moment in manifest.moments if moment.name in ("disks", "snapshot")]
    assert len(taken) == 2
    assert manifest.moments[0].name == "pause" and manifest.moments[-1].name == "resume"
    verified = stage.controller.verify_boot(stage.repository, result.backup, timeout_seconds=200)
    assert "serial" in verified.life
    # The LUN's overlay is no file beside it: it lies in the state folder.
    frozen = stage.controller.backup("vm001", stage.repository, freeze="overlay")
    assert stage.repository.manifest(frozen.backup).freeze == "overlay"
    assert not (stage.controller.folders.state_dir / "qemu" / "freezes").exists()
    stage.controller.remove_vm("vm001")
    stage.controller.add_vm("vm001", "qemu", reach)
    assert block_graph(machine) == graph
    bench.see_that_nothing_is_left()
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def test_a_consistent_backup_runs_its_duplicate_on_writable_luns(bench: Bench) -> None:
    stage, machine = bench.stage, bench.stage.machine
    entries, count, processes = stage.entries(), machine.latest_count(), processes_of(stage.place)
    result = stage.controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)
    assert result.mode == "consistent" and result.warnings == ()
    bench.see_that_nothing_is_left()
    assert processes_of(stage.place) == processes
    image = stage.disk(result.backup, "disk1")
    assert not ext4.needs_recovery(image) and ext4.complaints(image) == ""
    kept = read_ledger(image)
    assert kept.integrity == "ok" and kept.buffered == kept.entries and kept.entries >= entries
    flushed = disk_records.flushed_count(stage.disk(result.backup, "disk0"))
    assert flushed is not None and flushed >= count
    machine.wait_for_count(machine.latest_count() + 20)
    assert machine.faults() == [] and stage.bridge.repeated() == set()


def test_a_restore_goes_onto_luns_that_exist_and_that_nobody_uses(bench: Bench) -> None:
    stage, server = bench.stage, bench.server
    result = stage.controller.backup("vm001", stage.repository)
    onto, images = {}, {}
    for index, size_mib in enumerate((256, 64)):
        target, image = f"iqn.2009-12.com.example:copy-{index}", bench.images / f"copy{index}.img"
        image.write_bytes(os.urandom(4 * MIB))
        os.truncate(image, size_mib * MIB)
        server.add(target, image, user=USER, password=WORD)
        onto[f"disk{index}"], images[f"disk{index}"] = server.address(target), image
    before = {device: image.read_bytes() for device, image in images.items()}

    def restore(onto: dict[str, str], name: str = "vm002", *, run: bool = False) -> RestoreResult:
        return stage.controller.restore(stage.repository, result.backup, name, isolated=True, onto=onto, run=run)

    for wrong, error, message in (
        ({"disk0": onto["disk0"], "disk1": server.address(TARGETS[1])}, Busy, r"in use by iqn.2008-11.org.linux-kvm"),
        ({"disk0": onto["disk1"]}, UsageError, f"has {64 * MIB} bytes, that in the backup {256 * MIB}"),
        ({"disk2": onto["disk1"]}, NotFound, "has no disk 'disk2'"),
        ({"": onto["disk1"]}, UsageError, "has 2 disks"),
        ({"disk0": onto["disk0"], "disk1": onto["disk0"]}, UsageError, "cannot both be written onto"),
        ({"disk0": "iscsi://192.0.2.1/iqn.2009-12.com.example:001/1"}, UsageError, "no snapshot mechanism knows it"),
    ):
        with pytest.raises(error, match=message) as refused:
            restore(wrong)
        assert "\n" not in str(refused.value)
    assert {device: image.read_bytes() for device, image in images.items()} == before
    assert stage.controller.journal.unfinished() == [] and stage.left() == []

    restored = restore(onto, run=True)
    driver = stage.controller.drivers.hypervisor("qemu", "vm002", restored.options)
    try:
        assert {disk.device: disk.address for disk in restored.disks} == onto
        assert all("Initiator: " in server.about(address.split("/")[3]) for address in onto.values())
        folder = stage.controller.folders.state_dir / "vms"
        assert not folder.exists() or not list(folder.rglob("*.raw"))
        with pytest.raises(AlreadyExists):
            restore(onto)
        log = Path(restored.options["qmp"]).with_name("serial.log")
        assert serial.faults(text_after_two_checks(log)) == []
        driver.destroy()
        with pytest.raises(HypervisorError, match=r"is disk disk0 of 'vm002' too"):
            restore(onto, "vm003")
    finally:
        driver.destroy()
        driver.close()
        stage.controller.remove_vm("vm002")
        for address, image in zip(onto.values(), images.values(), strict=True):
            server.remove(address.split("/")[3])
            image.unlink()
    bench.see_that_nothing_is_left()


def test_the_vm_table_shows_both_and_the_duplicate_takes_over_on_its_own_luns(bench: Bench) -> None:
    stage, machine = bench.stage, bench.stage.machine
    held = stage.controller.backup("vm001", stage.repository, keep_duplicate=True)
    duplicate = f"iqn.2009-12.com.example:{held.duplicate}"
    addresses = {"disk0": bench.server.address(duplicate), "disk1": bench.server.address(f"{duplicate}.1")}
    assert bench.row("vm001") == {"disk0": bench.server.address(TARGETS[0]), "disk1": bench.server.address(TARGETS[1])}
    assert bench.row(held.duplicate) == addresses
    assert sorted(bench.server.targets()) == sorted([*TARGETS, duplicate, f"{duplicate}.1"])
    assert "Readonly: Yes" not in bench.server.about(duplicate)
    assert "ACL information:\n        127.0.0.1\n" in bench.server.about(duplicate)
    after = machine.wait_for_count(machine.latest_count() + 20)
    stage.kill_vm()
    begun = len(machine.serial_text())
    result = stage.controller.failover("vm001")
    assert result.duplicate == held.duplicate
    counts = goes_on(stage, begun)
    assert counts[0] <= after + 20
    assert bench.row("vm001") == addresses
    assert stage.controller.vm("vm001").state == VmState.EXECUTING.value
    assert "Initiator: " in bench.server.about(duplicate), "it reaches its LUN over iSCSI"
    assert "Initiator: " not in bench.server.about(TARGETS[0])
