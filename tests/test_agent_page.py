"""The page, in Debian's Chromium: a person clicks a backup, watches it, restores it. Against a real agent over TLS."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.agents import AgentHouse, eventually
from tests.browser import Browser, browser, make_certificate
from vmsnap.agent.jobs import NewJob

pytestmark = pytest.mark.chromium

SCREENSHOTS = os.environ.get("VMSNAP_SCREENSHOTS")
"""A folder: the pictures of the documentation are made anew there."""


@pytest.fixture(scope="module")
def served() -> Iterator[AgentHouse]:
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    certificate, key = make_certificate(folder)
    configuration = f'[agent]\nlisten = "127.0.0.1:0"\ncertificate = "{certificate}"\nkey = "{key}"\n'
    house = AgentHouse(folder, vms=2, configuration=configuration)
    house.start_agent()
    yield house
    house.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def token(served: AgentHouse) -> str:
    return str(served.json("agent", "token", "add", "grace", "--role", "admin")["token"])


@pytest.fixture
def window(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path) as opened:
        yield opened


def enter(window: Browser, house: AgentHouse, token: str, page: str = "") -> None:
    window.driver.get(f"{house.https}/{page}")
    window.field("Token").send_keys(token, Keys.ENTER)
    window.until_text("(")


def backed_up(house: AgentHouse, vm: str, least: int) -> int:
    """See to it that a VM has so many backups at least, and that the agent knows them; returns how many."""
    while (count := len(house.json("list", "--vm", vm))) < least:
        house.json("backup", vm)
    with house.looking() as looked:
        for new in looked.refreshes([house.repository]):
            looked.jobs.add(new)
    house.quiet()
    return count


def picture(window: Browser, name: str) -> None:
    if SCREENSHOTS:
        window.driver.save_screenshot(str(Path(SCREENSHOTS) / f"agent-{name}.png"))


def test_a_backup_is_clicked_watched_and_restored(served: AgentHouse, token: str, window: Browser) -> None:
    enter(window, served, token)
    window.until_text("never")
    picture(window, "vms")
    window.click("vm001", "a")
    for number in range(1, 4):
        window.click("Back up", "main//button")
        window.field("Tag").send_keys(f"clicked-{number}")
        window.click("Back up", "dialog//button")
        window.until(lambda _, n=number: f"clicked-{n}" in window.text(), "the new backup in the table")
    backups = served.json("list")
    assert [backup["tags"] for backup in backups] == [["clicked-1"], ["clicked-2"], ["clicked-3"]]
    assert window.find("//*[name()='svg'][contains(@aria-label, 'Timeline of 3 backups')]")
    assert window.find("//*[name()='svg'][contains(@aria-label, 'stood still')]")
    bars = window.driver.find_elements(By.CSS_SELECTOR, "svg.plot .bar")
    assert len(bars) == 3
    picture(window, "vm")

    window.click(backups[-1]["backup"], "main//td//a")
    window.until_text("Evidence of one instant")
    assert "simulated" in window.text()
    picture(window, "backup")
    window.click("Restore")
    name = window.field("Name of the new VM")
    name.clear()
    name.send_keys("vm001-by-hand")
    assert "A new VM vm001-by-hand is made" in window.text() and "Nothing is overwritten" in window.text()
    picture(window, "restore")
    window.click("Restore", "dialog//button")
    window.until_text("restore of vm001-by-hand is done")
    assert served.executes("vm001-by-hand") and served.executes("vm001")
    window.click("Jobs")
    window.until_text("vm001-by-hand")
    picture(window, "jobs")
    assert window.errors() == []


def test_a_running_job_is_seen_as_it_goes_and_can_be_stopped(served: AgentHouse, token: str, window: Browser) -> None:
    enter(window, served, token, "#/jobs")
    with served.looking() as house:
        added, _ = house.jobs.add(
            NewJob(verb="backup", arguments=("backup", "vm002"), vm="vm002", repository=served.repository)
        )

    def pid() -> int | None:
        with served.looking() as house:
            found = house.jobs.get(added.job)
        return found.pid if found.state == "running" else None

    process = eventually(pid, "the backup")
    os.kill(process, signal.SIGSTOP)
    try:
        window.until(
            lambda driver: driver.find_elements(By.XPATH, f"//tr[.//a='{added.job}'][contains(., 'running')]"),
            "running",
        )
        window.click(str(added.job), "main//td//a")
        window.click("Stop it")
        window.until_text("it was asked to stop")
    finally:
        os.kill(process, signal.SIGCONT)
    window.until(lambda driver: "cancelled" in window.text() or "done" in window.text(), "its end")
    assert served.ended(added.job).state == "cancelled" and served.executes("vm002")


def test_pruning_shows_first_what_would_go(served: AgentHouse, token: str, window: Browser) -> None:
    count = backed_up(served, "vm002", 3)
    enter(window, served, token, "#/vms/vm002")
    window.click("Remove old ones")
    keep = window.field("Keep last")
    keep.clear()
    keep.send_keys("1")
    window.click("Show what would go")
    window.until_text("They cannot be brought back")
    assert len(served.json("list", "--vm", "vm002")) == count, "nothing is removed yet"
    picture(window, "prune")
    window.click(f"Remove {count - 1}", "dialog//button")
    window.until_text("prune of vm002 is done")
    assert len(served.json("list", "--vm", "vm002")) == 1


def test_a_backup_is_proved_by_booting_and_its_duplicate_takes_a_dead_vms_place(
    served: AgentHouse, token: str, window: Browser
) -> None:
    backup = served.json("backup", "vm002", "--keep-duplicate")["backup"]
    backed_up(served, "vm002", 1)
    enter(window, served, token, f"#/backups/{backup}")
    window.click("Verify", "main//button")
    window.field("Bring it up too").click()
    window.click("Verify", "dialog//button")
    window.until_text("verify is done")
    (verify,) = served.jobs("verify")
    with served.looking() as house:
        assert house.jobs.result(verify.job)["boot"]["life"]

    served.text("stop", "--force", "vm002", script="vmsnap-sim")
    window.driver.get(f"{served.https}/#/vms/vm002")
    window.click("Fail over", "main//button")
    window.until_text("is lost to it")
    sure = window.field("Type vm002 to confirm")
    sure.send_keys("vm001", Keys.ENTER)
    window.until_text("that is not vm002")
    assert not served.jobs("failover")
    sure.clear()
    sure.send_keys("vm002", Keys.ENTER)
    window.until_text("failover of vm002 is done")
    assert served.executes("vm002")


def test_the_timeline_shows_every_vm_and_those_without_a_backup_too(
    served: AgentHouse, token: str, window: Browser
) -> None:
    count = backed_up(served, "vm002", 2)
    served.json("start", "vm-new", "--memory", "4M", "--disk", "4M", script="vmsnap-sim")
    enter(window, served, token, "#/timeline")
    row = "//li[.//a='{}']"
    assert window.find(f"{row.format('vm002')}//*[name()='svg'][contains(@aria-label, '{count} backups, the last')]")
    assert "none" in window.find(row.format("vm-new")).text
    dashes = window.driver.find_elements(By.XPATH, f"{row.format('vm002')}//*[contains(@class, 'dash')]")
    assert len(dashes) == count
    picture(window, "timeline")
    window.find("//input[@type='search']").send_keys("new")
    window.until(lambda driver: len(driver.find_elements(By.CSS_SELECTOR, ".timeline li")) == 1, "the one that fits")
    link = window.find("//li//a[.='vm-new']")
    link.send_keys(Keys.ENTER)
    window.until_text("Hypervisor")
    assert window.errors() == []


def test_schedules_and_the_doctor_by_keyboard_alone(served: AgentHouse, token: str, window: Browser) -> None:
    enter(window, served, token, "#/schedules")
    field = window.field("Name")
    field.send_keys("nightly", Keys.TAB)
    window.driver.switch_to.active_element.send_keys(Keys.TAB, *("vm001",))
    window.driver.switch_to.active_element.send_keys(Keys.ENTER)
    window.until_text("30 2 * * *")
    assert [each["name"] for each in served.json("schedule", "list")] == ["nightly"]
    picture(window, "schedules")
    rest = window.find("//button[@aria-label='Let rest: nightly']")
    rest.send_keys(Keys.ENTER)
    window.until_text("rests")
    assert served.json("schedule", "list")[0]["paused"]
    window.driver.get(f"{served.https}/#/doctor")
    window.find("//main//button[.='Look']").send_keys(Keys.SPACE)
    window.until_text("simulated")
    picture(window, "doctor")
    window.driver.get(f"{served.https}/#/vms/vm001")
    window.find("//main//button[.='Back up']").send_keys(Keys.ENTER)
    assert window.find("//dialog").is_displayed()
    window.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    window.until(lambda driver: not driver.find_element(By.ID, "dialog").is_displayed(), "the dialog's end")
    assert window.errors() == []


def test_who_may_only_read_is_offered_nothing_else_and_a_wrong_token_nothing_at_all(
    served: AgentHouse, window: Browser
) -> None:
    reader = str(served.json("agent", "token", "add", "reader", "--role", "read")["token"])
    enter(window, served, reader, "#/vms/vm001")
    window.until_text("Hypervisor")
    assert not window.driver.find_elements(By.XPATH, "//main//button")
    window.click("Go out")
    window.field("Token").send_keys("vmsnap_wrong", Keys.ENTER)
    window.until_text("the token is unknown")


def test_on_a_phone_in_the_dark_nothing_runs_over_the_edge(served: AgentHouse, token: str, tmp_path: Path) -> None:
    backed_up(served, "vm001", 1)
    with browser(tmp_path, width=390, height=844, dark=True) as phone:
        enter(phone, served, token)
        phone.until_text("vm001")
        for page in ("#/vms", "#/vms/vm001", "#/timeline", "#/jobs", "#/schedules", "#/backups", "#/doctor"):
            phone.driver.get(f"{served.https}/{page}")
            phone.find("//main//h1")
            over = phone.driver.execute_script(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert over <= 0, page
            if page == "#/vms/vm001":
                phone.until_text("How long the guest stood still")
                picture(phone, "phone")
        ground = phone.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(20, 24, 28)"
