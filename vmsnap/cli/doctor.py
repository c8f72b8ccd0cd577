"""``vmsnap doctor``: what works on this host, what is missing, and the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmsnap.cli import output
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.errors import VmsnapError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsnap.model import Finding

_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}


@click.command(cls=SessionCommand, epilog="vmsnap doctor\nvmsnap doctor web1")
@click.argument("vm", required=False)
@by_agent("doctor", dict)
@pass_session
def doctor(session: Session, vm: str | None) -> None:
    """Look at this host and its drivers, or whether a backup of VM would work; and at the repository, where one is
    named. Changes nothing.

    For a VM the exit code says it too: 0 where a backup would work, else 1.
    """
    with session.controller() as controller:
        found = controller.doctor(vm)
    if vm is None:
        wanted = {"vmsnap", session.hypervisor}
        found = [pair for pair in found if session.hypervisor is None or pair[0] in wanted]
    found += repository_findings(session)
    report_findings(session, found)
    if vm is not None and any(finding.severity == "missing" for _, finding in found):
        raise VmsnapError(f"VM {vm!r} cannot be backed up so", cure="the lines marked missing say why")


def repository_findings(session: Session) -> list[tuple[str, Finding]]:
    """What the storage of the configured repository says; nothing where none is configured."""
    return storage_findings(session) if session.named_repository() else []


def storage_findings(session: Session) -> list[tuple[str, Finding]]:
    """What the storage backend of the repository's URL says of that place."""
    from vmsnap.model import Finding

    try:
        storage = session.storage()
    except VmsnapError as e:
        # Without the URL: what is wrong with it may be a secret in it.
        return [("repository", Finding("its URL", "missing", e.message, e.cure))]
    try:
        return [(storage.name, finding) for finding in storage.doctor()]
    finally:
        storage.close()


def report_findings(session: Session, found: Sequence[tuple[str, Finding]]) -> None:
    """Write the findings, each with its cure below it."""

    def people() -> None:
        width = max((len(driver) for driver, _ in found), default=0)
        for driver, finding in found:
            severity = click.style(f"{finding.severity:7}", fg=_COLOURS.get(finding.severity))
            text = output.printable(f"{finding.subject}: {finding.message}")
            click.echo(f"{severity}  {driver:{width}}  {text}")
            if finding.cure:
                click.echo(f"{'':{width + 9}}  {click.style('cure:', bold=True)} {output.printable(finding.cure)}")

    document = [
        {
            "driver": driver,
            "subject": finding.subject,
            "severity": finding.severity,
            "message": finding.message,
            "cure": finding.cure,
        }
        for driver, finding in found
    ]
    session.emit(document, people)
