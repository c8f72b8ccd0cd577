"""``vmsnap verify`` and ``vmsnap check``: is everything what was written?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import not_yet
from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.errors import DamageFound

if TYPE_CHECKING:
    from vmsnap.repository import CheckFinding, CheckReport, Repository


@click.command(cls=SessionCommand, epilog="vmsnap verify web1-20260101T120000Z-1a2b3c -r /srv/backups")
@click.argument("backup")
@not_yet("--boot", is_flag=True)
@pass_session
def verify(session: Session, backup: str) -> None:
    """Read and authenticate all of BACKUP: every byte of its memory and disks.

    Exit code 4 where something is not what was written; the lines name what it touches.
    """
    from vmsnap.cli.progress import byte_bar

    repository = session.open_repository()
    try:
        manifest = repository.manifest(backup)
        with byte_bar("verifying") as progress:
            report = repository.verify(manifest.backup, progress)
    except DamageFound as e:
        finding = {"object": "", "severity": "damage", "message": e.message, "touches": []}
        session.emit({"backup": backup, "damaged": True, "read_bytes": 0, "findings": [finding]}, lambda: None)
        raise
    document = {"backup": manifest.backup, **_document(report)}
    _report(session, report, document, f"{manifest.backup} is whole, {output.size(report.read_bytes)} were verified")


@click.command(cls=SessionCommand, epilog="vmsnap check -r /srv/backups\nvmsnap check -r /srv/backups --read-data")
@click.option("--read-data", is_flag=True, help="Read and authenticate every stored byte too.")
@pass_session
def check(session: Session, read_data: bool) -> None:
    """Check the repository: that all that its backups name is there.

    Exit code 4 where something is missing or damaged; the lines name the backups that it touches.
    """
    report_check(session, session.open_repository(), read_data)


def report_check(session: Session, repository: Repository, read_data: bool) -> None:
    """Check a repository and report it.

    :raises DamageFound: there is damage
    """
    from vmsnap.cli.progress import byte_bar

    with byte_bar("checking") as progress:
        report = repository.check(read_data=read_data, progress=progress)
    document = {"backups": report.backups, "packs": report.packs, **_document(report)}
    read = f", {output.size(report.read_bytes)} were read" if read_data else ""
    _report(session, report, document, f"no damage in {report.backups} backups and {report.packs} packs{read}")


def _document(report: CheckReport) -> dict[str, Any]:
    return {
        "damaged": report.damaged,
        "read_bytes": report.read_bytes,
        "findings": [
            {
                "object": finding.object,
                "severity": finding.severity,
                "message": finding.message,
                "touches": [
                    {
                        "backup": touch.backup,
                        "part": touch.part,
                        "offset": touch.offset,
                        "lost_bytes": touch.lost_bytes,
                    }
                    for touch in finding.touches
                ],
            }
            for finding in report.findings
        ],
    }


def _report(session: Session, report: CheckReport, document: dict[str, Any], whole: str) -> None:
    def people() -> None:
        for finding in report.findings:
            _show(finding)
        if not report.damaged:
            click.echo(whole)

    session.emit(document, people)
    report.raise_if_damaged()


def _show(finding: CheckFinding) -> None:
    colour = "red" if finding.severity == "damage" else "yellow"
    click.echo(f"{click.style(f'{finding.severity:6}', fg=colour)}  {output.printable(finding.message)}")
    for touch in finding.touches:
        lost = f", {output.size(touch.lost_bytes)} from offset {touch.offset}" if touch.lost_bytes else ""
        click.echo(f"        touches {output.printable(f'{touch.backup}: {touch.part}')}{lost}")
