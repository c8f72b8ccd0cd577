"""What Prometheus is told: counted from the database when it asks, so that nothing is lost with a process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vmsnap import __version__
from vmsnap.agent.house import House
from vmsnap.agent.jobs import DONE
from vmsnap.agent.schedule import next_slot
from vmsnap.counters import PAUSE_BUCKETS_SECONDS, read_counters
from vmsnap.journal import Journal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAILURE_KINDS = {
    "": "broken off",
    "1": "failed",
    "2": "wrong use",
    "3": "not found",
    "4": "damage",
    "5": "busy",
    "6": "driver unavailable",
    "130": "interrupted",
}
"""What the exit code of a job says, see `vmsnap.errors`; without one its process ended without a word."""

_FROM_ORDER_TO_ORDER = """
SELECT o.vm, (resumed.ended_ns - paused.begun_ns) / 1e9 AS seconds, max(o.begun_ns)
FROM operation o
JOIN entry paused ON paused.operation = o.operation AND paused.instruction = 'pause'
JOIN entry resumed ON resumed.operation = o.operation AND resumed.instruction = 'resume' AND resumed.status = 'done'
WHERE o.begun_ns > ? AND o.outcome = 'done'
GROUP BY o.vm
"""
_STALL_DAYS = 2


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
        yield from self._counted()

    def _backups(self) -> Iterator[Metric]:
        newest = self._house.catalogue.newest()
        per_vm = [
            ("vmsnap_last_backup_timestamp_seconds", "When the newest backup of a VM was made"),
            ("vmsnap_last_backup_pause_seconds", "How long the guest stood still for it"),
            ("vmsnap_last_backup_read_bytes", "What was read for it"),
            ("vmsnap_last_backup_stored_bytes", "What it added to the repository"),
            ("vmsnap_last_backup_seconds", "How long it took"),
            ("vmsnap_last_backup_lost_bytes", "What repair could not save of it"),
            ("vmsnap_last_backup_size_bytes", "What it is of: memory and disks"),
            ("vmsnap_last_backup_dedup_ratio", "Bytes of the machine for each byte that was new in the repository"),
        ]
        families = [GaugeMetricFamily(name, text, labels=["vm"]) for name, text in per_vm]
        for vm, backup in newest.items():
            size = (backup.get("memory_bytes") or 0) + sum(disk["size_bytes"] for disk in backup.get("disks", ()))
            values = (
                datetime.fromisoformat(backup["time"]).timestamp(),
                backup.get("pause_seconds"),
                backup.get("read_bytes"),
                backup.get("stored_bytes"),
                backup.get("seconds"),
                backup.get("lost_bytes"),
                size,
                size / max(1, backup.get("stored_bytes") or 0),
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
            "What is made outside of vmsnap and not removed: at work, or left",
            labels=["kind"],
        )
        for row in left:
            leftovers.add_metric([row["kind"]], row["number"])
        yield leftovers
        abandoned = GaugeMetricFamily(
            "vmsnap_leftovers", "What nobody works on and is still there: vmsnap recover removes it", labels=["kind"]
        )
        for kind, number in self._leftovers().items():
            abandoned.add_metric([kind], number)
        yield abandoned
        stalls = GaugeMetricFamily(
            "vmsnap_last_backup_stall_seconds",
            "From the order to stop to the end of the order to go on: the longest that the guest can have noticed",
            labels=["vm"],
        )
        since = time.time_ns() - _STALL_DAYS * 86400 * 10**9
        for row in database.rows(_FROM_ORDER_TO_ORDER, since):
            stalls.add_metric([row["vm"]], row["seconds"])
        yield stalls
        owed = database.rows("SELECT count(*) AS number FROM operation WHERE executing = 1 AND outcome IS NOT NULL")
        yield GaugeMetricFamily(
            "vmsnap_guests_owed", "VMs that must execute again and do not yet, after a failure", owed[0]["number"]
        )

    def _leftovers(self) -> Counter[str]:
        journal = Journal(self._house.database)
        found: Counter[str] = Counter()
        for operation in journal.unfinished():
            if operation.outcome is not None or not operation.worker_alive():
                found.update(each.kind for each in journal.open_operation(operation.operation).resources())
        return found

    def _counted(self) -> Iterator[Metric]:
        counts = read_counters(self._house.database)
        jobs = CounterMetricFamily("vmsnap_jobs", "Jobs that ended", labels=["verb", "state"])
        failures = CounterMetricFamily(
            "vmsnap_failures", "Jobs that ended otherwise than done, by the kind of failure", labels=["verb", "kind"]
        )
        by_state: Counter[tuple[str, str]] = Counter()
        for (verb, state, code), number in counts.get("jobs", {}).items():
            by_state[verb, state] += int(number)
            if state != DONE:
                failures.add_metric([verb, FAILURE_KINDS.get(code, f"exit code {code}")], number)
        for (verb, state), ended in by_state.items():
            jobs.add_metric([verb, state], ended)
        yield from (jobs, failures)
        for name, text, labels in (
            ("operations", "Runs of protocols that ended, by whoever began them", ["protocol", "outcome"]),
            ("failed_instructions", "Instructions of protocols that failed", ["protocol", "instruction"]),
        ):
            family = CounterMetricFamily(f"vmsnap_{name}", text, labels=labels)
            for values, number in counts.get(name, {}).items():
                family.add_metric(values, number)
            yield family
        interventions = CounterMetricFamily(
            "vmsnap_interventions", "What a guardian or a recovery did to set things right", labels=["by"]
        )
        for by in ("guardian", "recover"):
            interventions.add_metric([by], counts.get("interventions", {}).get((by,), 0))
        yield interventions
        for name, text in (
            ("read_bytes", "What the agent's backups read"),
            ("stored_bytes", "What of it was new in the repository"),
        ):
            yield CounterMetricFamily(f"vmsnap_backup_{name}", text, counts.get(name, {}).get((), 0))
        yield _pauses(counts)


def _pauses(counts: Mapping[str, Mapping[tuple[str, ...], float]]) -> HistogramMetricFamily:
    in_bucket, total = counts.get("pauses", {}), 0.0
    buckets = []
    for edge in (*map(repr, PAUSE_BUCKETS_SECONDS), "+Inf"):
        total += in_bucket.get((edge,), 0)
        buckets.append((edge, total))
    found = HistogramMetricFamily("vmsnap_backup_pause_seconds", "How long guests stood still for the agent's backups")
    found.add_metric([], buckets, counts.get("pause_seconds", {}).get((), 0))
    return found


def _info() -> GaugeMetricFamily:
    info = GaugeMetricFamily("vmsnap_agent_info", "1, with the version as a label", labels=["version"])
    info.add_metric([__version__], 1)
    return info
