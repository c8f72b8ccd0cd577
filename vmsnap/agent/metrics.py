"""What Prometheus is told: counted from the database when it asks, so that nothing is lost with a process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vmsnap import __version__
from vmsnap.agent.house import House
from vmsnap.agent.schedule import next_slot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RECENT_SECONDS = 30 * 86400


def metrics_text(house: House) -> bytes:
    """All metrics in Prometheus' text format.

    :raises VmsnapError: the database cannot be read
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(house))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, house: House) -> None:
        self._house = house

    def collect(self) -> Iterator[Metric]:
        yield _info()
        yield from self._backups()
        yield from self._jobs()
        yield from self._schedules()
        yield from self._journal()

    def _backups(self) -> Iterator[Metric]:
        newest = self._house.catalogue.newest()
        per_vm = [
            ("vmsnap_last_backup_timestamp_seconds", "When the newest backup of a VM was made"),
            ("vmsnap_last_backup_pause_seconds", "How long the guest stood still for it"),
            ("vmsnap_last_backup_read_bytes", "What was read for it"),
            ("vmsnap_last_backup_stored_bytes", "What it added to the repository"),
            ("vmsnap_last_backup_seconds", "How long it took"),
            ("vmsnap_last_backup_lost_bytes", "What repair could not save of it"),
        ]
        families = [GaugeMetricFamily(name, text, labels=["vm"]) for name, text in per_vm]
        for vm, backup in newest.items():
            values = (
                datetime.fromisoformat(backup["time"]).timestamp(),
                backup.get("pause_seconds"),
                backup.get("read_bytes"),
                backup.get("stored_bytes"),
                backup.get("seconds"),
                backup.get("lost_bytes"),
            )
            for family, value in zip(families, values, strict=True):
                if value is not None:
                    family.add_metric([vm], value)
        yield from families
        count = GaugeMetricFamily("vmsnap_backups", "How many backups a VM has", labels=["vm"])
        for vm, number in self._house.catalogue.counts().items():
            count.add_metric([vm], number)
        yield count
        # So that one without any backup can be told from one that is not registered.
        registered = GaugeMetricFamily("vmsnap_vm_registered", "1 for each registered VM", labels=["vm"])
        for vm in self._house.working_vms():
            registered.add_metric([vm], 1)
        yield registered

    def _jobs(self) -> Iterator[Metric]:
        ended = GaugeMetricFamily(
            "vmsnap_jobs_last_day", "Jobs that ended in the last 24 hours", labels=["verb", "state", "exit_code"]
        )
        day_ago = time.time_ns() - 86400 * 10**9
        for row in self._house.database.rows(
            "SELECT verb, state, coalesce(exit_code, '') AS code, count(*) AS number FROM job WHERE ended_ns > ?"
            " GROUP BY verb, state, code",
            day_ago,
        ):
            ended.add_metric([row["verb"], row["state"], str(row["code"])], row["number"])
        yield ended
        running = GaugeMetricFamily("vmsnap_jobs_open", "Jobs that have not ended", labels=["verb", "state"])
        for (verb, state), number in Counter((job.verb, job.state) for job in self._house.jobs.open()).items():
            running.add_metric([verb, state], number)
        yield running
        waiting = self._house.database.rows("SELECT count(*) AS number FROM notice")[0]["number"]
        yield GaugeMetricFamily("vmsnap_notices_waiting", "Completion notices not delivered yet", waiting)

    def _schedules(self) -> Iterator[Metric]:
        paused = GaugeMetricFamily("vmsnap_schedule_paused", "1 where a schedule rests", labels=["schedule"])
        coming = GaugeMetricFamily(
            "vmsnap_schedule_next_timestamp_seconds", "The next slot of a schedule", labels=["schedule"]
        )
        now = datetime.now(UTC)
        for row in self._house.schedules.rows():
            paused.add_metric([row.schedule.name], int(row.paused))
            slot = None if row.paused else next_slot(row.schedule, now)
            if slot is not None:
                coming.add_metric([row.schedule.name], slot.timestamp())
        yield paused
        yield coming

    def _journal(self) -> Iterator[Metric]:
        database = self._house.database
        left = database.rows("SELECT kind, count(*) AS number FROM resource WHERE gone = 0 GROUP BY kind")
        leftovers = GaugeMetricFamily(
            "vmsnap_resources",
            "What is made outside of vmsnap and not removed: held, at work, or left",
            labels=["kind"],
        )
        for row in left:
            leftovers.add_metric([row["kind"]], row["number"])
        yield leftovers
        since = time.time_ns() - _RECENT_SECONDS * 10**9
        deeds = database.rows(
            "SELECT instruction, count(*) AS number FROM entry WHERE instruction IN ('guardian', 'recover')"
            " AND begun_ns > ? GROUP BY instruction",
            since,
        )
        interventions = GaugeMetricFamily(
            "vmsnap_interventions", "What a guardian or a recovery did in the last 30 days", labels=["by"]
        )
        numbers = {row["instruction"]: row["number"] for row in deeds}
        for by in ("guardian", "recover"):
            interventions.add_metric([by], numbers.get(by, 0))
        yield interventions
        owed = database.rows("SELECT count(*) AS number FROM operation WHERE executing = 1 AND outcome IS NOT NULL")
        yield GaugeMetricFamily(
            "vmsnap_guests_owed", "VMs that must execute again and do not yet, after a failure", owed[0]["number"]
        )


def _info() -> GaugeMetricFamily:
    info = GaugeMetricFamily("vmsnap_agent_info", "1, with the version as a label", labels=["version"])
    info.add_metric([__version__], 1)
    return info
