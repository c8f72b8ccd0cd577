"""``vmsnap jobs``: what an agent does and has done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.remote import agent_option, client_of
from vmsnap.cli.session import Session, SessionCommand, pass_session

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap jobs
        vmsnap jobs 17
        vmsnap jobs --vm web1 --agent https://host1:8443""",
)
@click.argument("job", type=int, required=False)
@click.option("--vm", metavar="NAME", help="Only those of this VM.")
@click.option("--state", metavar="STATE", help="Only those that are queued, running, done, failed, …")
@click.option("--limit", metavar="N", type=click.IntRange(1, 500), default=50, show_default=True)
@agent_option
@pass_session
def jobs(session: Session, job: int | None, vm: str | None, state: str | None, limit: int) -> None:
    """Show the newest jobs, or one JOB with what came of it: those of this host's agent, or of another one's."""
    if session.agent:
        client = client_of(session)
        found = client.get(f"/jobs/{job}") if job is not None else client.get("/jobs", vm=vm, state=state, limit=limit)
    else:
        found = _own(session, job, vm or "", state or "", limit)
    if job is not None:
        session.emit(found, lambda: output.fields([(key, value) for key, value in found.items() if value is not None]))
        return
    items = found["items"]
    session.emit(items, lambda: _table(items))


def _own(session: Session, job: int | None, vm: str, state: str, limit: int) -> dict[str, Any]:
    from vmsnap.agent.jobs import Jobs
    from vmsnap.agent.notices import job_document

    with session.controller() as controller:
        known = Jobs(controller.table.database)
        if job is not None:
            return {**job_document(known.get(job)), "result": known.result(job)}
        return {"items": [job_document(each) for each in known.page(vm=vm, state=state, limit=limit)]}


def _table(items: list[Mapping[str, Any]]) -> None:
    output.table(
        ("job", "verb", "vm", "state", "created", "schedule", "by", "message"),
        [
            (
                each["job"],
                each["verb"],
                each["vm"] or "-",
                each["state"],
                output.local_time(each["created"]),
                each["schedule"] or "-",
                each["requester"],
                each["message"],
            )
            for each in items
        ],
        right=("job",),
    )
