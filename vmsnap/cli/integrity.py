"""``vmsnap verify``, ``check`` and ``repair``: is everything what was written, and what can be saved where not?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import driver_options, limit_rate, shutdown_timeout
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import DriverCommand, Session, SessionCommand, pass_session
from vmsnap.errors import DamageFound, UsageError

if TYPE_CHECKING:
    from vmsnap.repository import CheckFinding, CheckReport, RepairReport, Repository, Subset, Touched

_RANGES_SHOWN = 8


@click.command(
    cls=DriverCommand,
    epilog="""\
        vmsnap verify web1-20260101T120000Z-1a2b3c -r /srv/backups
        vmsnap verify web1-20260101T120000Z-1a2b3c -r /srv/backups --boot""",
)
@click.argument("backup")
@click.option("--boot", is_flag=True, help="Bring it up too, apart from everything, see it live, and shut it down.")
@click.option(
    "--alive-within",
    metavar="SECONDS",
    type=float,
    default=10.0,
    show_default=True,
    help="With --boot: how long a sign of life is waited for.",
)
@shutdown_timeout
@driver_options
@limit_rate
@by_agent(
    "verify",
    lambda alive_within, timeout, **same: {
        "alive_within_seconds": alive_within,
        "timeout_seconds": timeout,
        **same,
    },
)
@pass_session
def verify(
    session: Session, backup: str, boot: bool, alive_within: float, timeout: float, options: dict[str, str]
) -> None:
    """Read and authenticate all of BACKUP: every byte of its memory and disks.

    Exit code 4 where something is not what was written; the lines name what it touches. With --boot it is brought up
    from the repository afterwards, on disks of its own, its network cut; it must show life and shut down in order,
    and is removed again.
    """
    from vmsnap.cli.progress import byte_bar

    try:
        repository = session.open_repository()
        manifest = repository.manifest(backup)
        with byte_bar("verifying") as progress:
            report = repository.verify(manifest.backup, progress)
    except DamageFound as e:
        session.emit({"backup": backup, **_unreadable(e)}, lambda: None)
        raise
    document = {"backup": manifest.backup, **_document(report)}
    verified = f"{output.size(report.read_bytes)} were verified"
    alive = ""
    if boot and not report.damaged:
        life, seconds = _boot(session, repository, manifest.backup, alive_within, timeout, options)
        document["boot"] = {"life": life, "seconds": seconds}
        alive = f"; it ran ({life}) and shut down in order, in {seconds:.1f} s"
    _report(session, report, document, f"{manifest.backup} is whole, {verified}{alive}", f"not whole, {verified}")


def _boot(
    session: Session, repository: Repository, backup: str, alive_within: float, timeout: float, options: dict[str, str]
) -> tuple[str, float]:
    from vmsnap.cli.progress import progress_bar

    with session.controller() as controller, progress_bar() as progress:
        result = controller.verify_boot(
            repository,
            backup,
            life_seconds=alive_within,
            timeout_seconds=timeout,
            options=options,
            progress=progress,
        )
    for warning in result.warnings:
        session.note(warning)
    return result.life, result.seconds


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap check -r /srv/backups
        vmsnap check -r /srv/backups --read-data
        vmsnap check -r /srv/backups --read-data --subset 1/7""",
)
@click.option("--read-data", is_flag=True, help="Read and authenticate every stored byte too.")
@click.option(
    "--subset",
    metavar="SHARE",
    help="With --read-data: read a share of the packs alone. 2/7 is the second of seven, P% (such as 5%) a random one.",
)
@limit_rate
@by_agent("check", dict)
@pass_session
def check(session: Session, read_data: bool, subset: str | None) -> None:
    """Check the repository: that all that its backups name is there.

    Exit code 4 where something is missing or damaged; the lines name the backups that it touches.
    """
    from vmsnap.repository import Subset

    if subset is not None and not read_data:
        raise UsageError("--subset chooses what --read-data reads", cure="add --read-data")
    share = None if subset is None else Subset.parse(subset)
    try:
        repository = session.open_repository()
    except DamageFound as e:
        counts = {"backups": 0, "packs": 0, "read_packs": 0, "subset": ""}
        session.emit({**counts, **_unreadable(e)}, lambda: None)
        raise
    report_check(session, repository, read_data, share)


@click.command(cls=SessionCommand, epilog="vmsnap repair -r /srv/backups --dry-run\nvmsnap repair -r /srv/backups")
@click.option("--dry-run", is_flag=True, help="Change nothing, only say what would be done.")
@click.option(
    "--forget-damaged", is_flag=True, help="Delete the manifests that cannot be read: nobody can restore them any more."
)
@limit_rate
@by_agent("repair", dict)
@pass_session
def repair(session: Session, dry_run: bool, forget_damaged: bool) -> None:
    """Save all that can be saved of a damaged repository, and note in each backup what it has lost.

    Reads every stored byte. A repository that is whole stays as it is. Exit code 4 where something is lost for good;
    the lines name the backups, disks and ranges.
    """
    from vmsnap.cli.progress import byte_bar

    repository = session.open_repository()
    with byte_bar("reading") as progress:
        report = repository.repair(dry_run=dry_run, forget_damaged=forget_damaged, progress=progress)
    document = {
        "dry_run": report.dry_run,
        "changed": report.changed,
        "backups": report.backups,
        "packs": report.packs,
        "read_bytes": report.read_bytes,
        "findings": [_finding(finding) for finding in report.findings],
        "actions": list(report.actions),
        "lost": [_touch(touch) for touch in report.lost],
        "unreadable": list(report.unreadable),
        "whole_again": list(report.whole_again),
        "waits_for": list(report.waits_for),
    }
    session.emit(document, lambda: _show_repair(report))
    report.raise_if_lost()


def report_check(session: Session, repository: Repository, read_data: bool, subset: Subset | None = None) -> None:
    """Check a repository and report it.

    :raises DamageFound: there is damage
    """
    from vmsnap.cli.progress import byte_bar

    with byte_bar("checking") as progress:
        report = repository.check(read_data=read_data, subset=subset, progress=progress)
    document = {
        "backups": report.backups,
        "packs": report.packs,
        "read_packs": report.read_packs,
        "subset": report.subset,
        **_document(report),
    }
    share = f"{report.read_packs} of {report.packs} packs ({report.subset})" if report.subset else "every pack"
    read = f"; {share} read, {output.size(report.read_bytes)}" if read_data else ""
    looked_at = f"in {report.backups} backups and {report.packs} packs{read}"
    _report(session, report, document, f"no damage {looked_at}", f"damage found {looked_at}")


def _document(report: CheckReport) -> dict[str, Any]:
    return {
        "damaged": report.damaged,
        "read_bytes": report.read_bytes,
        "findings": [_finding(finding) for finding in report.findings],
    }


def _unreadable(damage: DamageFound) -> dict[str, Any]:
    """As `_document`, for what could not even be opened."""
    finding = {"object": "", "severity": "damage", "message": damage.message, "touches": []}
    return {"damaged": True, "read_bytes": 0, "findings": [finding]}


def _finding(finding: CheckFinding) -> dict[str, Any]:
    return {
        "object": finding.object,
        "severity": finding.severity,
        "message": finding.message,
        "touches": [_touch(touch) for touch in finding.touches],
    }


def _touch(touch: Touched) -> dict[str, Any]:
    return {
        "backup": touch.backup,
        "part": touch.part,
        "offset": touch.offset,
        "lost_bytes": touch.lost_bytes,
        "ranges": [{"offset": offset, "length": length} for offset, length in touch.ranges],
    }


def _report(session: Session, report: CheckReport, document: dict[str, Any], whole: str, damaged: str) -> None:
    def people() -> None:
        for finding in report.findings:
            _show(finding)
        click.echo(damaged if report.damaged else whole)

    session.emit(document, people)
    report.raise_if_damaged()


def _show(finding: CheckFinding) -> None:
    colour = "yellow" if finding.severity == "note" else "red"
    click.echo(f"{click.style(f'{finding.severity:6}', fg=colour)}  {output.printable(finding.message)}")
    for touch in finding.touches:
        click.echo(f"        touches {_lost(touch)}")


def _show_repair(report: RepairReport) -> None:
    for finding in report.findings:
        _show(finding)
    for action in report.actions:
        click.echo(f"{'would' if report.dry_run else 'done':6}  {output.printable(action)}")
    for touch in report.lost:
        click.echo(f"{click.style('lost', fg='red')}    {_lost(touch)}")
    for backup in report.unreadable:
        click.echo(f"{click.style('lost', fg='red')}    {output.printable(backup)}: all")
    if not report.changed:
        more = " more" if report.lost or report.unreadable else ""
        click.echo(f"nothing{more} to repair in {report.backups} backups and {report.packs} packs")
    for session in report.waits_for:
        click.echo(f"waits   {output.printable(session)}")
    if report.waits_for:
        click.echo("vmsnap gc deletes the damaged packs when these have ended")


def _lost(touch: Touched) -> str:
    """What is lost of a part of a backup, for people: some ranges, and how many more there are."""
    what = output.printable(f"{touch.backup}: {touch.part}")
    if not touch.lost_bytes:
        return what
    ranges = [f"{offset}-{offset + length}" for offset, length in touch.ranges[:_RANGES_SHOWN]]
    more = f" and {len(touch.ranges) - len(ranges)} more" if len(touch.ranges) > len(ranges) else ""
    return f"{what}, {output.size(touch.lost_bytes)} at {', '.join(ranges)}{more}"
