"""What the API answers, as OpenAPI tells it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Problem(BaseModel):
    """Why something was refused or failed, and what to do about it; each is one line."""

    error: str
    cure: str = ""


class JobShape(BaseModel):
    """A job. Times are UTC, RFC 3339. `state`: queued, starting, running, done, failed, cancelled, broken off."""

    job: int
    verb: str
    vm: str
    repository: str
    arguments: list[str]
    schedule: str
    slot: str | None
    attempt: int
    requester: str
    state: str
    created: str | None
    not_before: str | None
    begun: str | None
    ended: str | None
    exit_code: int | None
    message: str


class JobDetail(JobShape):
    """A job with how far it has come while it runs, and what the command reported when it was done."""

    progress: dict[str, Any] | None = None
    result: Any = None


class JobPage(BaseModel):
    """Jobs, the newest first; `next` is what `before` takes to go on, None at the end."""

    items: list[JobShape]
    next: int | None = None


class JobList(BaseModel):
    """Jobs."""

    items: list[JobShape]


class BackupShape(BaseModel):
    """A backup, as `vmsnap show` reports it."""

    model_config = ConfigDict(extra="allow")
    backup: str
    vm: str
    time: str
    mode: str
    repository: str
    pause_seconds: float | None = None
    stored_bytes: int = 0
    read_bytes: int = 0
    memory_bytes: int = 0


class BackupPage(BaseModel):
    """Backups, the newest first; `next` is what `before` takes to go on, None at the end."""

    items: list[BackupShape]
    next: str | None = None


class VmShape(BaseModel):
    """A VM of the VM table, with its last backup and the job that works on it."""

    vm: str
    hypervisor: str
    state: str
    resume_flag: bool
    kind: str
    duplicate_of: str | None
    options: dict[str, str]
    disks: list[dict[str, str | None]]
    backups: int
    last_backup: BackupShape | None
    held_duplicate: str | None
    job: JobShape | None


class VmPage(BaseModel):
    """VMs by name; `next` is what `after` takes to go on, None at the end."""

    items: list[VmShape]
    next: str | None = None


class Dot(BaseModel):
    """A backup in a timeline."""

    backup: str
    time: str
    mode: str
    pause_seconds: float | None


class TimelineRow(BaseModel):
    """A VM in a timeline, with its newest backups in that stretch of time."""

    vm: str
    backups: list[Dot]


class TimelinePage(BaseModel):
    """VMs by name, with what they have from `since` to `until`; `next` is what `after` takes to go on."""

    since: str
    until: str
    items: list[TimelineRow]
    next: str | None = None


class ScheduleShape(BaseModel):
    """A schedule as it stands; `schedule` has its fields. `next` is its next slot, UTC, without jitter."""

    name: str
    paused: bool
    configured: bool
    next: str | None
    schedule: dict[str, Any]


class ScheduleList(BaseModel):
    """All schedules, by name."""

    items: list[ScheduleShape]


class Paused(BaseModel):
    """Whether a schedule rests."""

    paused: bool


class TokenShape(BaseModel):
    """A token, without what it is."""

    name: str
    role: str
    created: str | None
    expires: str | None
    expired: bool


class TokenList(BaseModel):
    """All tokens, by name."""

    items: list[TokenShape]


class NewToken(BaseModel):
    """A token that is to be made."""

    model_config = ConfigDict(extra="forbid")
    name: str
    role: str
    expires_seconds: int | None = None


class MadeToken(BaseModel):
    """A token that was made: it is shown this once."""

    name: str
    role: str
    token: str


class Health(BaseModel):
    """Whether the agent does its work."""

    status: str
    version: str
    loop_seconds: float


class Summary(BaseModel):
    """The host at a glance."""

    version: str
    role: str
    who: str
    vms: int
    backups: int
    open_jobs: int
    failed_jobs_today: int
    notices_waiting: int
    repositories: list[str]
