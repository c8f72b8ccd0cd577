"""What the agent works with: the host's folders and database, schedules, jobs, settings. One for each thread."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from vmsnap.agent.catalogue import Catalogue
from vmsnap.agent.deciding import jobs_of_run
from vmsnap.agent.jobs import Job, Jobs, NewJob
from vmsnap.agent.pools import mount_points, pool_of
from vmsnap.agent.schedule import Schedule
from vmsnap.agent.schedules import Schedules
from vmsnap.agent.settings import AgentSettings
from vmsnap.agent.tags import VmTags
from vmsnap.agent.tokens import Tokens
from vmsnap.database import FILE_NAME, Database
from vmsnap.errors import UsageError
from vmsnap.vmtable import VmTable

REFRESH = "refresh"
_WORKING = "working"


@dataclass(frozen=True)
class Blueprint:
    """All that a house is made of, to be handed from thread to thread. `repository` is the configured one, empty for
    none.
    """

    state_dir: Path
    settings: AgentSettings
    schedules: tuple[Schedule, ...] = ()
    repository: str = ""


class House:
    """One connection to the database, and what stands in it. Not shared between threads."""

    def __init__(self, blueprint: Blueprint) -> None:
        """:raises VmsnapError: the database cannot be opened"""
        self.blueprint = blueprint
        self.database = Database(blueprint.state_dir / FILE_NAME)
        self.jobs = Jobs(self.database)
        self.schedules = Schedules(self.database, blueprint.schedules)
        self.catalogue = Catalogue(self.database)
        self.tokens = Tokens(self.database)
        self.tags = VmTags(self.database)

    @cached_property
    def vms(self) -> VmTable:
        """The VM table."""
        return VmTable(self.database)

    def working_vms(self) -> list[str]:
        """The names of the VMs that can be backed up."""
        return [row["vm"] for row in self.database.rows("SELECT vm FROM vm WHERE kind = ?", _WORKING)]

    def pools(self, vms: Collection[str]) -> dict[str, frozenset[str]]:
        """The storage pools in which each of those VMs has disks."""
        names = sorted(set(vms) - {""})
        marks = ",".join("?" * len(names))
        rows = self.database.rows(f"SELECT vm, address FROM disk WHERE vm IN ({marks})", *names)
        mounts = mount_points() if rows else frozenset()
        found: dict[str, set[str]] = {}
        for row in rows:
            pool = pool_of(row["address"], mounts)
            if pool:
                found.setdefault(row["vm"], set()).add(pool)
        return {vm: frozenset(pools) for vm, pools in found.items()}

    def repositories(self) -> list[str]:
        """The repositories that jobs may use: the configured one first, those of schedules, those of the settings."""
        of_schedules = [row.schedule.repository for row in self.schedules.rows()]
        named = (self.blueprint.repository, *of_schedules, *self.blueprint.settings.repositories)
        return list(dict.fromkeys(url for url in named if url))

    def run_of(self, schedule: Schedule, slot: datetime, now: datetime, requester: str) -> list[NewJob]:
        """The jobs of one run of a schedule; see `jobs_of_run`."""
        repository = schedule.repository or self.blueprint.repository
        newest = None
        if schedule.verb == "verify":
            newest = {vm: each["backup"] for vm, each in self.catalogue.newest(repository=repository).items()}
        return jobs_of_run(
            schedule,
            slot,
            now,
            self.working_vms(),
            self.jobs.last_done_ns(schedule.verb),
            self.jobs.open(),
            newest_backup=newest,
            tags=self.tags.all() if schedule.names_tags else None,
            default_repository=self.blueprint.repository,
            requester=requester,
        )

    def run_now(self, name: str, requester: str) -> list[Job]:
        """Enter the jobs of a schedule now, whatever its slots and windows are; they are not tried again later than
        it would.

        :raises NotFound: there is none of that name
        :raises UsageError: no repository is configured, or there is no VM for it
        """
        from dataclasses import replace

        schedule = self.schedules.get(name).schedule
        now = datetime.now(UTC)
        found = self.run_of(schedule, now, now, requester)
        if not found:
            raise UsageError(
                f"there is nothing to do for schedule {name!r}: no VM that it means is without such a job already",
                cure="see: vmsnap vm list, vmsnap jobs",
            )
        return [self.jobs.add(replace(new, slot_ns=None, not_before_ns=0))[0] for new in found]

    def refreshes(self, repositories: Sequence[str], *, everything: bool = False) -> list[NewJob]:
        """Jobs that bring the catalogue of those repositories up to date, but where one is queued already."""
        queued = {job.repository for job in self.jobs.open() if job.verb == REFRESH and job.state == "queued"}
        words = ("agent", "refresh", *(("--all",) if everything else ()))
        return [
            NewJob(verb=REFRESH, arguments=words, repository=url, requester="agent")
            for url in dict.fromkeys(repositories)
            if url and url not in queued
        ]

    def close(self) -> None:
        """Close the connection; idempotent."""
        self.database.close()
