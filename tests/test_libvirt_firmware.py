"""A domain with UEFI firmware, whose variables are in a file, and an emulated TPM: both are of the instant, the
restored domain has its own, and they go with it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import serial as console
from tests.libvirt_stage import Stage, staged
from tests.qemu_stage import until
from tests.test_qemu_machines import FIRMWARE, VARIABLES, measured

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

TPM = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>"
UEFI = (
    f"<loader readonly='yes' type='pflash'>{FIRMWARE}</loader>"
    f"<nvram template='{VARIABLES}'>{{folder}}/variables.fd</nvram>"
)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(more_devices=TPM, more_os=UEFI, tpm=1) as made:
        until(lambda: bool(measured(made.machine.serial_text())), "the TPM works")
        made.controller.backup("vm001", made.repository)
        yield made


def tpm_states(stage: Stage) -> set[str]:
    """The UUIDs of the domains of which libvirt keeps the state of a TPM."""
    return {path.name for path in (stage.libvirtd.folder / "lib" / "swtpm").iterdir()}


def emulators() -> list[str]:
    """The UUIDs of those whose TPM a process emulates now, on this host."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].endswith("swtpm"):
            found += [Path(part).parent.name for word in words for part in word.split(",") if "dir=" in part]
    return found


def test_a_restored_domain_has_firmware_variables_and_a_tpm_of_its_own(stage: Stage) -> None:
    controller, virsh, rest = stage.controller, stage.libvirtd.virsh, stage.at_rest()
    assert tpm_states(stage) == {stage.machine.uuid}
    before = measured(stage.machine.serial_text())[-1]
    backup = controller.backup("vm001", stage.repository)
    after = measured(stage.machine.serial_text())[-1]
    assert backup.warnings == () and stage.at_rest() == rest
    assert "<tpm" in stage.repository.manifest(backup.backup).definition["xml"]
    with stage.restored(backup.backup, define="yes") as (restored, _):
        log = stage.serial_log("vm002")
        until(lambda: len(measured(log.read_text())) >= 2 and len(console.checks(log.read_text())) >= 1, "it goes on")
        assert before <= measured(log.read_text())[0] <= after + 1, "the TPM goes on at the instant"
        assert console.faults(log.read_text()) == []
        tree = ET.fromstring(virsh("dumpxml", "vm002"))
        (variables,) = (disk.address for disk in restored.disks if disk.device == "pflash1")
        assert tree.findtext("os/nvram") == variables
        assert Path(variables).read_bytes() == (stage.machine.folder / "variables.fd").read_bytes()
        uuid = tree.findtext("uuid") or ""
        assert tpm_states(stage) == {stage.machine.uuid, uuid} and uuid in emulators()
    assert tpm_states(stage) == {stage.machine.uuid} and uuid not in emulators()
    assert stage.at_rest() == rest
    numbers = len(measured(stage.machine.serial_text()))
    until(lambda: len(measured(stage.machine.serial_text())) > numbers, "the original's TPM works on")
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []


def test_a_duplicate_with_a_tpm_shuts_down_and_leaves_no_state_of_it(stage: Stage) -> None:
    """It is transient, and ends by itself."""
    rest = stage.at_rest()
    result = stage.controller.backup("vm001", stage.repository, mode="consistent", timeout_seconds=200)
    assert result.mode == "consistent" and {disk.device for disk in stage.repository.manifest(result.backup).disks} == {
        "vda", "vdb", "pflash1",
    }  # fmt: skip
    assert stage.at_rest() == rest and tpm_states(stage) == {stage.machine.uuid}
