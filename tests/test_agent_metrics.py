"""What Prometheus is told of backups, failures and guardians, and that its own tool takes that and the alert rules."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.agents import AgentHouse
from tests.lab.qemus import cache_folder
from tests.test_agent_loop import Night
from vmsnap.agent.jobs import NewJob
from vmsnap.agent.metrics import metrics_text
from vmsnap.database import FILE_NAME, Database
from vmsnap.journal import Deed, Journal

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    made = AgentHouse(tmp_path, vms=2)
    yield made
    made.close()


def promtool(*words: str, text: bytes | None = None) -> str:
    """Run it; it must be content."""
    done = subprocess.run(
        [str(cache_folder() / "promtool" / "promtool"), *words], input=text, capture_output=True, timeout=60
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return (done.stdout + done.stderr).decode()


def told(house: AgentHouse) -> Mapping[str, float]:
    """All samples, each by its name and labels."""
    with house.looking() as looked:
        text = metrics_text(looked).decode()
    samples = re.findall(r"^(vmsnap_\S+?(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def test_the_rules_are_what_promtool_takes_and_fire_when_they_should() -> None:
    assert "12 rules found" in promtool("check", "rules", str(EXAMPLES / "prometheus-alerts.yml"))
    assert "SUCCESS" in promtool("test", "rules", str(EXAMPLES / "prometheus-alerts-test.yml"))


def test_backups_failures_and_what_is_left_are_counted_and_promtool_takes_it(house: AgentHouse) -> None:
    night = Night(house)
    with house.looking() as looked:
        words: tuple[tuple[str, str], ...] = (("backup", "vm001"), ("backup", "vm001"), ("backup", "nobody"))
        for verb, vm in words:
            looked.jobs.add(NewJob(verb=verb, arguments=(verb, vm), vm=vm, repository=house.repository))
    night.settle()
    house.json("backup", "vm002")
    with house.looking() as looked:
        text = metrics_text(looked)
    assert promtool("check", "metrics", text=text) == ""
    found = told(house)
    assert found['vmsnap_jobs_total{state="done",verb="backup"}'] == 2
    assert found['vmsnap_failures_total{kind="not found",verb="backup"}'] == 1
    by_command_line_too = 'vmsnap_operations_total{outcome="done",protocol="backup, mode live"}'
    assert found[by_command_line_too] == 3
    backups = house.json("list", "--vm", "vm001")
    newest = backups[-1]
    assert found["vmsnap_backup_stored_bytes_total"] == sum(backup["stored_bytes"] for backup in backups)
    assert found["vmsnap_backup_read_bytes_total"] == sum(backup["read_bytes"] for backup in backups)
    assert found["vmsnap_backup_pause_seconds_count"] == 2 == found['vmsnap_backup_pause_seconds_bucket{le="+Inf"}']
    assert found["vmsnap_backup_pause_seconds_sum"] == pytest.approx(sum(each["pause_seconds"] for each in backups))
    size = newest["memory_bytes"] + sum(disk["size_bytes"] for disk in newest["disks"])
    assert found['vmsnap_last_backup_size_bytes{vm="vm001"}'] == size == 8 << 20
    assert found['vmsnap_last_backup_dedup_ratio{vm="vm001"}'] == pytest.approx(size / newest["stored_bytes"])
    stall = found['vmsnap_last_backup_stall_seconds{vm="vm001"}']
    assert newest["pause_seconds"] <= stall < 60, "what we see from outside holds what the hypervisor saw"
    assert not [name for name in found if name.startswith("vmsnap_leftovers{")]
    assert found['vmsnap_interventions_total{by="guardian"}'] == 0

    # Killed in the middle: its process is gone, what it made is still there until the recovery.
    with house.looking() as looked:
        looked.jobs.add(NewJob(verb="backup", arguments=("backup", "vm001"), vm="vm001", repository=house.repository))
    running = night.until_running("backup")
    assert running.pid
    operation = Journal(Database(house.state / FILE_NAME)).begin("backup, mode live", "vm002", "simulated", {})
    operation.will_make("file", "", '"/nonexistent"')
    operation.end("failed")
    assert told(house)['vmsnap_leftovers{kind="file"}'] >= 1
    os.kill(running.pid, signal.SIGKILL)
    night.settle()
    found = told(house)
    assert found['vmsnap_failures_total{kind="broken off",verb="backup"}'] == 1
    assert not [name for name in found if name.startswith("vmsnap_leftovers{")], "recovered"
    assert found['vmsnap_interventions_total{by="recover"}'] >= 1
    night.loop.close()


def test_counts_do_not_go_down_when_old_rows_are_forgotten(house: AgentHouse) -> None:
    database = Database(house.state / FILE_NAME)
    operation = Journal(database).begin("backup, mode live", "vm001", "simulated", {})
    operation.begun("check")
    operation.ended("check", "failed", "x")
    operation.did(Deed.now("guardian", "made the VM execute"))
    operation.end("failed")
    expected = {
        'vmsnap_interventions_total{by="guardian"}': 1,
        'vmsnap_failed_instructions_total{instruction="check",protocol="backup, mode live"}': 1,
        'vmsnap_operations_total{outcome="failed",protocol="backup, mode live"}': 1,
    }
    assert told(house).items() >= expected.items()
    with database.transaction() as db:
        db.execute("DELETE FROM operation")
        db.execute("DELETE FROM job")
    assert told(house).items() >= expected.items()
    database.close()
