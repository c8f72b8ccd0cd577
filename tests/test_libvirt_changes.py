"""Somebody changes, forgets, saves or ends a domain while it is backed up: the backup fails at once and says what it
was, stores nothing, and nothing of it is left.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab.libvirtd import Libvirtd
from tests.lab.ports import free_port
from tests.libvirt_stage import Stage, staged
from tests.qemu_stage import until
from tests.workers import worker_that_waits_at
from vmsnap.errors import HypervisorError
from vmsnap.roles import CaptureRequest

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as made:
        made.controller.backup("vm001", made.repository)
        yield made


def told_by(stage: Stage, call: str, meanwhile: Callable[[], object]) -> str:
    """How a backup fails during which something was done before its `call` was made."""
    stored = len(stage.repository.list())
    worker: subprocess.Popen[str] = worker_that_waits_at(
        stage.controller.folders.state_dir, str(stage.place / "repository"), call, max_pause_seconds=20
    )
    try:
        meanwhile()
        told, _ = worker.communicate("x", timeout=120)
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode != 0, told
    assert len(stage.repository.list()) == stored
    assert stage.controller.recover().kept == ()
    return told


def test_a_disk_that_is_attached_before_the_pause_leaves_the_guest_running(stage: Stage) -> None:
    virsh, rest = stage.libvirtd.virsh, stage.at_rest()
    image = stage.place / "third.raw"
    image.write_bytes(bytes(8 << 20))
    told = told_by(stage, "prepare", lambda: virsh("attach-disk", "vm001", str(image), "vdc", "--live"))
    assert "VM 'vm001' was changed during its capture: virtio-disk2 was attached (back it up again)" in told
    assert "\nduplicate\n" not in told, "it was not stopped"
    stage.machine.wait_for_count(stage.machine.latest_count() + 20)
    detach(stage)
    assert stage.machine.faults() == []
    assert stage.at_rest()[0] == rest[0]


def detach(stage: Stage) -> None:
    """Take the third disk out, and wait until the guest has let it go: libvirt does for 5 s at most."""
    stage.libvirtd.virsh("detach-disk", "vm001", "vdc", "--live")
    until(lambda: "vdc" not in stage.libvirtd.virsh("domblklist", "vm001"), "the guest lets the disk go")


def test_a_disk_that_is_detached_before_the_pause_leaves_the_guest_running(stage: Stage) -> None:
    virsh, controller = stage.libvirtd.virsh, stage.controller
    image = stage.place / "fourth.raw"
    image.write_bytes(bytes(8 << 20))
    virsh("attach-disk", "vm001", str(image), "vdc", "--live")
    rest = stage.at_rest()
    told = told_by(stage, "prepare", lambda: detach(stage))
    assert "VM 'vm001' was changed during its capture: virtio-disk2 was detached (back it up again)" in told
    assert "\nduplicate\n" not in told, "it was not stopped"
    stage.machine.wait_for_count(stage.machine.latest_count() + 20)
    assert "vdc" in rest[0]["domblklist vm001"] and "vdc" not in virsh("domblklist", "vm001")
    assert stage.at_rest()[5:] == rest[5:], "no file, process or job is left"
    result = controller.backup("vm001", stage.repository)
    assert [disk.device for disk in result.disks] == ["vda", "vdb"]


def test_a_disk_that_is_resized_meanwhile(stage: Stage) -> None:
    """The guest's memory knows the new size, and a snapshot in the storage would be read to the old one."""
    driver, request = stage.controller.drivers.hypervisor("libvirt", "vm001", stage.options), CaptureRequest("bk", 20)
    disk = driver.describe().disks[1]
    size_bytes = disk.size_bytes + (1 << 20)
    stage.libvirtd.virsh("blockresize", "vm001", disk.device, f"{size_bytes}B")
    driver.prepare(request, driver.plan_capture(request))
    driver.pause()
    duplicate = driver.duplicate()
    driver.resume()
    with pytest.raises(HypervisorError, match=f"disk vdb was resized from {disk.size_bytes} to {size_bytes} bytes"):
        driver.finish_duplicate(duplicate, lambda _: None)
    driver.abandon()
    driver.discard_duplicate("bk")
    driver.close()
    stage.machine.wait_for_count(stage.machine.latest_count() + 20)
    assert stage.machine.faults() == []
    assert stage.controller.backup("vm001", stage.repository).disks[1].size_bytes == size_bytes


def test_a_domain_that_is_undefined_or_saved_meanwhile(stage: Stage) -> None:
    virsh = stage.libvirtd.virsh
    definition = stage.place / "vm001.xml"
    definition.write_text(virsh("dumpxml", "--inactive", "vm001"))
    told = told_by(stage, "prepare", lambda: virsh("undefine", "vm001"))
    assert "VM 'vm001' was changed during its capture: it was undefined" in told
    virsh("define", str(definition))
    stage.machine.wait_for_count(stage.machine.latest_count() + 20)

    # Before anything of ours is in its block graph, which QEMU would not give up.
    told = told_by(stage, "plan_capture", lambda: virsh("managedsave", "vm001"))
    assert "domain 'vm001' does not run (saved)" in told, told
    virsh("start", "vm001")
    stage.machine.note_process()
    stage.machine.wait_for_count(stage.machine.latest_count() + 20)
    assert stage.controller.backup("vm001", stage.repository).mode == "live"
    assert stage.machine.faults() == []


def test_a_domain_that_is_migrated_to_another_host(stage: Stage) -> None:
    """The other host is a second libvirtd, which says that it is one."""
    virsh = stage.libvirtd.virsh
    with Libvirtd(stage.place / "lw", host_uuid=str(uuid.uuid4())) as other:
        # Not live, which under TCG loses pages.
        words = ("migrate", "--unsafe", "--persistent", "vm001")
        there = (other.uri, "--migrateuri", f"tcp://127.0.0.1:{free_port()}")
        # Before anything of ours is in its block graph, which QEMU would not give up.
        told = told_by(stage, "plan_capture", lambda: virsh(*words, *there))
        assert "domain 'vm001' does not run (migrated)" in told, told
        assert other.virsh("domstate", "vm001").strip() == "running"
        count = stage.machine.latest_count()
        until(lambda: stage.machine.latest_count() >= count + 20, "it counts on there")
        # Nobody may take its place, and it is found where it is now.
        with pytest.raises(HypervisorError, match="was migrated to another host, and may run there"):
            stage.controller.drivers.hypervisor("libvirt", "vm001", stage.options).fence()
        other.virsh("destroy", "vm001")
    virsh("start", "vm001")
    stage.machine.note_process()
    assert stage.controller.backup("vm001", stage.repository).mode == "live"
    assert stage.machine.faults() == []


def test_a_domain_that_is_ended_in_its_pause(stage: Stage) -> None:
    """The last one."""
    virsh = stage.libvirtd.virsh
    told = told_by(stage, "duplicate", lambda: virsh("destroy", "vm001"))
    assert "ERROR the domain behind" in told and "ended" in told
    assert virsh("domstate", "vm001").strip() == "shut off"
    assert stage.controller.journal.unfinished() == []
