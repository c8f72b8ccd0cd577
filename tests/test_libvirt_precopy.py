"""Pre-copy of a domain under TCG, which has the lab's QEMU 10.0 as its ``<emulator>``; and where that would lose pages.
That 7.2 always would is in ``test_libvirt_inputs.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import serial as console
from tests.libvirt_stage import Stage, staged
from tests.test_libvirt_inputs import domain, refused_precopy
from tests.test_live_backup_qemu import text_after_two_checks

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

SCREEN = "<video><model type='vga'/></video>"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(qemu="10.0", options={"capture": "precopy"}) as made:
        made.controller.backup("vm001", made.repository)
        yield made


def test_on_10_0_memory_is_copied_before_the_pause_and_comes_back(stage: Stage) -> None:
    controller, machine = stage.controller, stage.machine
    rest = stage.at_rest()
    before = machine.latest_count()
    result = controller.backup("vm001", stage.repository)
    after = machine.latest_count()
    assert result.capture == "precopy" and result.warnings == () and 0 < result.pause_seconds <= 5
    assert stage.at_rest() == rest
    stage.see_nothing_of_ours()
    manifest = stage.repository.manifest(result.backup)
    assert (manifest.hypervisor, manifest.capture) == ("libvirt", "precopy")
    assert manifest.hypervisor_version.startswith("10.0.")
    with stage.restored(result.backup):
        text = text_after_two_checks(stage.serial_log("vm002"))
        assert console.faults(text) == [] and before <= console.counts(text)[0] <= after + 200
    assert stage.at_rest() == rest
    machine.wait_for_check(machine.latest_check() + 1)
    assert machine.faults() == []


def test_it_is_refused_where_memory_is_in_more_than_one_piece(stage: Stage) -> None:
    with domain(stage, "lossy", more=SCREEN):
        refused_precopy(stage, "lossy", "vga.vram; KVM does not")
