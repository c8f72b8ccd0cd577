"""A real Linux guest under libvirtd: backed up live, brought back beside the first, shut down for consistent disks, and
replaced when it fails. virsh sees nothing of it afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import disk_records
from tests.lab import serial as console
from tests.lab.libvirtd import USER
from tests.left_out import some_of
from tests.libvirt_stage import Stage, staged
from tests.qemu_stage import until
from tests.test_live_backup_qemu import text_after_two_checks
from vmsnap.errors import Busy, CannotCapture, UnknownVm, VmGone, VmsnapError
from vmsnap.model import Disk, VmState
from vmsnap.roles import CaptureRequest
from vmsnap_drivers.qemu.libvirt.address import LibvirtAddress

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

ROUNDS = 10
BARE = """<domain type='qemu'><name>bare</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>
<emulator>{}</emulator><memballoon model='none'/></devices></domain>"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as made:
        yield made


def test_live_backups_in_a_row_leave_nothing_that_virsh_could_see(stage: Stage) -> None:
    machine, disk_bytes = stage.machine, sum(disk.size_bytes for disk in stage.machine.disks)
    stage.controller.backup("vm001", stage.repository)
    rest = stage.at_rest()
    for number, _ in enumerate(some_of(range(ROUNDS))):
        result = stage.controller.backup("vm001", stage.repository)
        assert result.warnings == ()
        assert 0 < result.pause_seconds <= 5
        assert result.read_bytes < disk_bytes, "the disks are read where they changed"
        assert stage.at_rest() == rest
        stage.see_nothing_of_ours()
        manifest = stage.repository.manifest(result.backup)
        assert manifest.hypervisor == "libvirt"
        assert {moment.source for moment in manifest.moments} >= {"qemu:STOP", "qemu:RESUME"}
        assert number + 2 == len(stage.repository.list())
    assert not stage.repository.check(read_data=True).findings
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def test_a_backup_is_a_domain_of_its_own_beside_the_first_isolated_and_on_its_own_disks(stage: Stage) -> None:
    machine, controller = stage.machine, stage.controller
    before = machine.latest_count()
    backup = controller.backup("vm001", stage.repository).backup
    after = machine.latest_count()
    rest = stage.at_rest()
    with stage.restored(backup, define="yes") as (restored, driver):
        text = text_after_two_checks(stage.serial_log("vm002"))
        assert console.faults(text) == []
        assert before <= console.counts(text)[0] <= after + 200, "it goes on at the captured count"
        assert driver.state() is VmState.EXECUTING
        assert {"vm001", "vm002"} <= set(driver.list_vms())
        first, second = (ET.fromstring(stage.libvirtd.virsh("dumpxml", vm)) for vm in ("vm001", "vm002"))
        assert first.findtext("uuid") != second.findtext("uuid")
        addresses = [
            {source.get("file") for source in tree.iterfind("devices/disk/source")} for tree in (first, second)
        ]
        assert addresses[1] == {disk.address for disk in restored.disks} and not addresses[0] & addresses[1]
        assert [link.get("state") for link in second.iterfind("devices/interface/link")] == ["down"]
        assert [nic.connected for nic in driver.describe().nics] == [False]
        assert stage.bridge.numbers() and stage.bridge.repeated() == set()
        assert len(stage.bridge.members()) == 2, "its own port, and that of the first"
        assert stage.libvirtd.virsh("domstate", "vm001").strip() == "running"
        assert "vm002" in stage.libvirtd.virsh("list", "--all", "--persistent", "--name").split()
        inactive = ET.fromstring(stage.libvirtd.virsh("dumpxml", "--inactive", "vm002"))
        assert {source.get("file") for source in inactive.iterfind("devices/disk/source")} == addresses[1]
        assert {owned.name for owned in driver.list_owned()} == {"vm002"}
        # What runs is backed up in turn.
        assert controller.backup("vm002", stage.repository).warnings == ()
    assert stage.at_rest() == rest
    stage.see_nothing_of_ours()
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def test_a_disk_of_another_domain_is_refused_also_one_that_does_not_run(stage: Stage) -> None:
    driver = stage.controller.drivers.hypervisor("libvirt", "vm001", stage.options)
    other = f"""<domain type='qemu'><name>other</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>
      <emulator>{stage.machine.qemu.wrapper}</emulator>
      <disk type='file' device='disk'><source file='{stage.machine.disk_path(1)}'/><target dev='vda'/></disk></devices>
      </domain>"""
    definition = stage.place / "other.xml"
    definition.write_text(other)
    stage.libvirtd.virsh("define", str(definition))
    try:
        with pytest.raises(Exception, match=r"writes to .*disk1.raw, which is a disk of domain 'other'"):
            driver.switch_disks([Disk(d.device, d.address, 0) for d in driver.describe().disks])
    finally:
        stage.libvirtd.virsh("undefine", "other")
        driver.close()


def test_a_consistent_backup_and_verify_boot_leave_nothing_and_the_original_never_notices(stage: Stage) -> None:
    machine, controller = stage.machine, stage.controller
    live = controller.backup("vm001", stage.repository)
    rest, count = stage.at_rest(), machine.latest_count()
    consistent = controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)
    assert stage.at_rest() == rest
    stage.see_nothing_of_ours()
    manifest = stage.repository.manifest(consistent.backup)
    assert manifest.mode == "consistent" and manifest.memory == ()
    assert (disk_records.flushed_count(_disk(stage, consistent.backup)) or 0) >= count
    assert disk_records.flushed_count(_disk(stage, live.backup)) is None

    assert stage.bridge.repeated() == set()
    verified = controller.verify_boot(stage.repository, live.backup, timeout_seconds=200, options=dict(stage.options))
    assert re.fullmatch(r"it wrote to its serial line \(serial.log\) within \d+\.\d s", verified.life)
    assert stage.at_rest() == rest
    stage.see_nothing_of_ours()
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def _disk(stage: Stage, backup: str) -> Path:
    manifest = stage.repository.manifest(backup)
    image = next(disk.image for disk in manifest.disks if disk.device == "vda")
    path = stage.place / f"{backup}.raw"
    with stage.repository.reader(image, "vda") as reader:
        reader.restore_to_file(path)
    return path


def test_what_cannot_be_is_told_in_one_line_with_its_cure(stage: Stage) -> None:
    new = stage.controller.drivers.hypervisor

    for uri, message in (
        (f"qemu:///nope?socket={stage.libvirtd.socket}", "unexpected qemu URI path '/nope'"),
        ("qemu:///system?socket=/nowhere", "Failed to connect socket to '/nowhere'"),
    ):
        with pytest.raises(VmsnapError, match=re.escape(message)) as raised:
            new("libvirt", "vm001", {"uri": uri}).describe()
        assert "\n" not in str(raised.value) and raised.value.cure, uri
        findings = new("libvirt", "vm001", {"uri": uri}).doctor()
        assert any(found.severity == "missing" and message in found.message for found in findings)

    with pytest.raises(UnknownVm, match="no domain with matching name 'nobody'"):
        new("libvirt", "nobody", stage.options).describe()
    assert new("libvirt", "nobody", stage.options).state() is VmState.ABSENT
    assert new("libvirt", "other", {**stage.options, "domain": stage.machine.uuid}).state() is VmState.EXECUTING

    definition = stage.place / "bare.xml"
    definition.write_text(BARE.format(stage.machine.qemu.wrapper))
    stage.libvirtd.virsh("define", str(definition))
    bare = new("libvirt", "bare", stage.options)
    with pytest.raises(VmGone, match="not running"):
        bare.describe()
    assert bare.state() is VmState.ABSENT
    stage.libvirtd.virsh("start", "bare")
    try:
        with pytest.raises(CannotCapture, match="the domain has no disk that could be backed up"):
            bare.plan_capture(CaptureRequest("bk", 5.0))
    finally:
        bare.close()
        stage.libvirtd.virsh("destroy", "bare")
        stage.libvirtd.virsh("undefine", "bare")


def test_a_block_job_of_somebody_else_is_left_alone(stage: Stage) -> None:
    copy = stage.place / "copy.raw"
    rest, stored = stage.at_rest(), len(stage.repository.list())
    stage.libvirtd.virsh(
        "blockcopy", "vm001", "vdb", "--dest", str(copy), "--format", "raw", "--bandwidth", "1", "--transient-job"
    )
    try:
        with pytest.raises(CannotCapture, match=r"the block job 'copy-vdb.*' \(mirror\) of somebody else is going on"):
            stage.controller.backup("vm001", stage.repository)
    finally:
        stage.libvirtd.virsh("blockjob", "vm001", "vdb", "--abort")
    assert len(stage.repository.list()) == stored
    assert stage.at_rest() == rest


def test_a_user_whom_libvirt_does_not_admit_is_told_so(stage: Stage) -> None:
    """Root without its capabilities stands for any user, as those may not even come to this test's Python."""
    stage.libvirtd.socket.chmod(0o600)
    shutil.chown(stage.libvirtd.socket, USER)
    program = "from vmsnap_drivers.qemu.monitor import Monitor; Monitor.borrow(__import__('sys').argv[1])"
    address = LibvirtAddress(stage.libvirtd.uri, stage.machine.uuid).text()
    try:
        answer = subprocess.run(
            ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", program, address],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        stage.libvirtd.socket.chmod(0o777)
        shutil.chown(stage.libvirtd.socket, "root")
    last = answer.stderr.strip().splitlines()[-1]
    assert "UsageError" in last and "Permission denied" in last and "run vmsnap as a user whom libvirt admits" in last


def test_a_duplicate_takes_the_place_of_the_killed_domain_and_never_of_one_that_lives(stage: Stage) -> None:
    """The last one, as nothing is as before."""
    machine, controller = stage.machine, stage.controller
    before = machine.latest_count()
    controller.backup("vm001", stage.repository, keep_duplicate=True)
    after = machine.wait_for_count(machine.latest_count() + 20)
    with pytest.raises(Busy, match="VM 'vm001' is running, says libvirt"):
        controller.failover("vm001")
    machine.wait_for_count(machine.latest_count() + 20)
    assert machine.faults() == []

    machine.kill()
    begun = len(machine.serial_text())
    result = controller.failover("vm001")
    assert "libvirt says that it does not run" in result.fenced and "nobody writes to its" in result.fenced
    until(lambda: len(console.checks(machine.serial_text()[begun:])) >= 2, "it counts on and checks itself")
    text = machine.serial_text()[begun:]
    assert console.faults(text) == [] and before <= console.counts(text)[0] <= after + 20
    until(lambda: bool(stage.bridge.repeated()), "its packets are on the bridge")
    tree = ET.fromstring(stage.libvirtd.virsh("dumpxml", "vm001"))
    assert tree.findtext("uuid") == machine.uuid
    inactive = ET.fromstring(stage.libvirtd.virsh("dumpxml", "--inactive", "vm001"))
    for found in (tree, inactive):
        addresses = {source.get("file") for source in found.iterfind("devices/disk/source")}
        assert addresses == {disk.address for disk in result.disks}
    stage.see_nothing_of_ours(*(disk.address for disk in result.disks))
    assert controller.backup("vm001", stage.repository).mode == "live"
    stage.see_nothing_of_ours(*(disk.address for disk in result.disks))
    driver = controller.drivers.hypervisor("libvirt", "vm001", stage.options)
    nics = driver.cut_network()
    assert [nic.connected for nic in nics] == [nic.connected for nic in driver.describe().nics] == [False]
    assert "down" in stage.libvirtd.virsh("domif-getlink", "vm001", nics[0].mac)
    driver.destroy()
    driver.close()
    assert stage.libvirtd.virsh("domstate", "vm001").strip() == "shut off"
