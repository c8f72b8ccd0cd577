"""The agent with a real Linux guest in QEMU: backed up by clicks in Chromium, and brought up beside itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.agents import AgentHouse
from tests.browser import browser, make_certificate
from tests.lab import LabMachine, available_qemus
from tests.lab import serial as console
from tests.test_agent_page import enter, picture
from tests.test_live_backup_qemu import processes_of, text_after_two_checks

pytestmark = [pytest.mark.qemu, pytest.mark.chromium]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    yield folder
    for pid in processes_of(folder):
        os.kill(pid, 9)
    shutil.rmtree(folder)


def test_a_real_guest_is_backed_up_by_clicking_and_restored_beside_itself(place: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(place)
    configuration = f'[agent]\nlisten = "127.0.0.1:0"\ncertificate = "{certificate}"\nkey = "{key}"\n'
    house = AgentHouse(place, vms=0, configuration=configuration)
    try:
        with LabMachine(place / "linux1", available_qemus()[-1]) as machine, browser(tmp_path) as window:
            machine.wait_for_check(50)
            house.json("vm", "add", "linux1", "--hypervisor", "qemu", "-o", f"qmp={machine.qmp_socket}")
            house.start_agent()
            token = house.json("agent", "token", "add", "ada", "--role", "operate")["token"]
            enter(window, house, token, "#/vms/linux1")
            for number in (1, 2):
                window.click("Back up", "main//button")
                window.field("Tag").send_keys(f"clicked-{number}")
                window.click("Back up", "dialog//button")
                window.until(lambda _, n=number: f"clicked-{n}" in window.text(), "the new backup")
            assert len(window.driver.find_elements(By.CSS_SELECTOR, "svg.plot .bar")) == 2
            picture(window, "qemu-vm")
            backups = house.json("list")
            assert all(0 < backup["pause_seconds"] < 5 for backup in backups)
            window.click(backups[-1]["backup"], "main//td//a")
            window.until_text("qemu:STOP")
            picture(window, "qemu-backup")
            window.click("Restore")
            name = window.field("Name of the new VM")
            name.clear()
            name.send_keys("linux1-copy")
            window.click("Restore", "dialog//button")
            window.until_text("restore of linux1-copy is done")
            assert house.executes("linux1-copy")
            log = Path(house.json("vm", "show", "linux1-copy")["options"]["qmp"]).parent / "serial.log"
            text = text_after_two_checks(log)
            assert len(console.checks(text)) >= 2 and not console.faults(text) and not machine.faults()
            machine.wait_for_check(machine.latest_check() + 50)
            assert window.errors() == []
    finally:
        house.close()
