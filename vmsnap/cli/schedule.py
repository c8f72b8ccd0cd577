"""``vmsnap schedule``: what the agent does, and when."""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from vmsnap.cli import output
from vmsnap.cli.agent import absolute, blueprint_of
from vmsnap.cli.options import duration_option
from vmsnap.cli.remote import agent_option, client_of
from vmsnap.cli.session import Session, SessionGroup, pass_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from vmsnap.agent.house import House
    from vmsnap.agent.schedules import ScheduleRow

_KEEPS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


@click.group(cls=SessionGroup)
def schedule() -> None:
    """Schedules: backups and verifications that the agent starts by itself."""


def _house(session: Session) -> AbstractContextManager[House]:
    from contextlib import contextmanager

    from vmsnap.agent.house import House

    @contextmanager
    def opened() -> Iterator[House]:
        house = House(blueprint_of(session))
        try:
            yield house
        finally:
            house.close()

    return opened()


@schedule.command(
    short_help="Add a schedule.",
    epilog="""\
        vmsnap schedule add nightly --cron '30 2 * * *' --vm 'web*' --vm db1 --keep-daily 7 --keep-weekly 4
        vmsnap schedule add often --cron '*/15 * * * *' --vm db1 --never 'mon-fri 08:00-09:00' --keep-duplicate
        vmsnap schedule add proof --cron '0 12 * * sun' --verb verify --boot --order least-recent""",
)
@click.argument("name")
@click.option("--cron", metavar="EXPRESSION", required=True, help="When: minute, hour, day, month, day of the week.")
@click.option("--vm", "vms", metavar="PATTERN", multiple=True, help="Which VMs; any number of times. Default: all.")
@click.option("--verb", type=click.Choice(["backup", "verify"]), default="backup", show_default=True)
@click.option("--boot", is_flag=True, help="With --verb verify: bring the newest backup up too.")
@click.option("--timezone", metavar="ZONE", default="", help="Such as Europe/Berlin. Default: the host's.")
@click.option(
    "--order",
    type=click.Choice(["fixed", "random", "least-recent"]),
    default="fixed",
    show_default=True,
    help="In which order the VMs of one slot come.",
)
@click.option("--at-once", type=int, metavar="N", default=1, show_default=True, help="How many of them together.")
@duration_option("--jitter", help="Let each wait a random time up to this.")
@click.option("--only", metavar="WINDOW", multiple=True, help="Start inside of this alone, such as 22:00-06:00.")
@click.option(
    "--never", metavar="WINDOW", multiple=True, help="Never start inside of this, such as 'mon-fri 8:00-18:00'."
)
@click.option(
    "--catch-up/--no-catch-up", default=True, show_default=True, help="Make up for missed slots with one run."
)
@click.option("--mode", type=click.Choice(["live", "consistent"]), default="live", show_default=True)
@click.option("--max-pause", "max_pause_seconds", metavar="SECONDS", type=float, default=5.0, show_default=True)
@click.option("--keep-duplicate", is_flag=True, help="Hold each backup's duplicate in memory, for vmsnap failover.")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Tags of its backups, beside schedule:NAME.")
@click.option("--keep-last", metavar="N", type=int, help="Remove those of its backups that no --keep rule keeps.")
@click.option("--keep-hourly", metavar="N", type=int, help="The same for hours, see vmsnap prune.")
@click.option("--keep-daily", metavar="N", type=int, help="The same for days.")
@click.option("--keep-weekly", metavar="N", type=int, help="The same for weeks.")
@click.option("--keep-monthly", metavar="N", type=int, help="The same for months.")
@click.option("--keep-yearly", metavar="N", type=int, help="The same for years.")
@click.option(
    "--retries", type=int, metavar="N", default=3, show_default=True, help="How often a failure is tried again."
)
@duration_option("--retry-after", help="How long after the first failure; then twice as long each time. Default: 1min.")
@agent_option
@pass_session
def add(session: Session, /, name: str, jitter: int | None, retry_after: int | None, **given: Any) -> None:
    """Add the schedule NAME. The agent carries it out; its first slot is the first from now on.

    Only the schedule's own backups count for its --keep rules. -r is its repository; without it, it is the
    configured one at the time.
    """
    from vmsnap.agent.schedule import schedule_from
    from vmsnap.places import refuse_secrets

    keep = {rule: given.pop(f"keep_{rule}") for rule in _KEEPS}
    refuse_secrets(session.repository or "")
    fields = {
        "name": name,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        "vms": list(given["vms"]) or ["*"],
        "keep": {rule: count for rule, count in keep.items() if count is not None},
        "jitter_seconds": jitter or 0,
        "retry_seconds": 60 if retry_after is None else retry_after,
        "repository": session.repository or "",
    }
    if session.agent:
        document = _told(client_of(session).post("/schedules", fields))
    else:
        made = schedule_from({**fields, "repository": absolute(session.repository or "")})
        with _house(session) as house:
            house.schedules.add(made)
            document = _document(house.schedules.get(name))
        _note_agent(session)
    session.emit(document, lambda: _table([document]))


@schedule.command("list", short_help="List the schedules.", epilog="vmsnap schedule list")
@agent_option
@pass_session
def list_schedules(session: Session) -> None:
    """List the schedules, those of the configuration file too, each with its next slot."""
    if session.agent:
        documents = [_told(each) for each in client_of(session).get("/schedules")["items"]]
    else:
        with _house(session) as house:
            documents = [_document(row) for row in house.schedules.rows()]
            for name, why in house.schedules.unusable.items():
                session.note(f"schedule {name} cannot be used: {why}")
    session.emit(documents, lambda: _table(documents))


@schedule.command(short_help="Remove a schedule.", epilog="vmsnap schedule remove nightly")
@click.argument("name")
@agent_option
@pass_session
def remove(session: Session, name: str) -> None:
    """Remove the schedule NAME; its backups stay, its queued jobs are taken back."""
    if session.agent:
        client_of(session).delete(_path(name))
    else:
        with _house(session) as house:
            house.schedules.remove(name)
    session.emit({"name": name}, lambda: click.echo(f"{name} is removed"))


@schedule.command(short_help="Let a schedule rest.", epilog="vmsnap schedule pause nightly")
@click.argument("name")
@agent_option
@pass_session
def pause(session: Session, name: str) -> None:
    """Let the schedule NAME rest, until vmsnap schedule resume. What runs goes on."""
    _set_paused(session, name, True)


@schedule.command(short_help="Let a schedule go on.", epilog="vmsnap schedule resume nightly")
@click.argument("name")
@agent_option
@pass_session
def resume(session: Session, name: str) -> None:
    """Let the schedule NAME go on; what fell into its rest is not caught up."""
    _set_paused(session, name, False)


@schedule.command("run-now", short_help="Run a schedule now.", epilog="vmsnap schedule run-now nightly")
@click.argument("name")
@agent_option
@pass_session
def run_now(session: Session, name: str) -> None:
    """Let the agent run the schedule NAME now, whatever its slots and windows are."""
    from vmsnap.agent.notices import job_document

    if session.agent:
        jobs = client_of(session).post(f"{_path(name)}/run", {})["items"]
    else:
        with _house(session) as house:
            jobs = [job_document(job) for job in house.run_now(name, "command line")]
        _note_agent(session)
    numbers = ", ".join(str(job["job"]) for job in jobs)
    session.emit(jobs, lambda: click.echo(f"queued: job {numbers}"))


def _set_paused(session: Session, name: str, paused: bool) -> None:
    if session.agent:
        document = _told(client_of(session).put(f"{_path(name)}/paused", {"paused": paused}))
    else:
        with _house(session) as house:
            document = _document(house.schedules.pause(name, paused))
    session.emit(document, lambda: click.echo(f"{name} {'rests' if paused else 'goes on'}"))


def _note_agent(session: Session) -> None:
    """Say that no agent runs, where that is so: then nothing will come of it."""
    path = session.folders().state_dir / "agent" / "lock"
    if not path.exists() or _free(path):
        session.note("no agent runs here; start one: vmsnap agent, or systemctl start vmsnap-agent")


def _free(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _document(row: ScheduleRow) -> dict[str, Any]:
    from vmsnap.agent.schedule import fields_of, next_slot

    slot = None if row.paused else next_slot(row.schedule, datetime.now(UTC))
    return {
        **fields_of(row.schedule),
        "paused": row.paused,
        "configured": row.configured,
        "next": None if slot is None else f"{slot:%Y-%m-%dT%H:%M:%SZ}",
    }


def _told(answer: Mapping[str, Any]) -> dict[str, Any]:
    """As `_document`, of what an agent answered."""
    return {**answer["schedule"], **{key: answer[key] for key in ("paused", "configured", "next")}}


def _path(name: str) -> str:
    return f"/schedules/{quote(name, safe='')}"


def _table(documents: Sequence[Mapping[str, Any]]) -> None:
    output.table(
        ("schedule", "what", "when", "vms", "keep", "next", "from"),
        [
            (
                found["name"],
                f"verify{' --boot' if found['boot'] else ''}" if found["verb"] == "verify" else found["mode"],
                f"{found['cron']} {found['timezone']}".rstrip(),
                ", ".join(found["vms"]),
                ", ".join(f"{key} {count}" for key, count in found["keep"].items()) or "all",
                "rests" if found["paused"] else output.local_time(found["next"] or "-"),
                "file" if found["configured"] else "",
            )
            for found in documents
        ],
    )
