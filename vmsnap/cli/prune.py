"""``vmsnap prune`` and ``vmsnap forget``: remove backups, by rules or by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmsnap.cli import output
from vmsnap.cli.options import duration_option
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session

if TYPE_CHECKING:
    from vmsnap.repository.pruning import PruneReport

F = TypeVar("F", bound=Callable[..., Any])

_COUNTED = {
    "last": "The newest N backups.",
    "hourly": "The newest of each of the last N hours that have one.",
    "daily": "The same for days.",
    "weekly": "The same for ISO weeks.",
    "monthly": "The same for months.",
    "yearly": "The same for years.",
}


def _counted_options(function: F) -> F:
    for name, text in reversed(_COUNTED.items()):
        number = click.IntRange(min=0)
        function = click.option(f"--keep-{name}", name, metavar="N", type=number, default=0, help=text)(function)
    return function


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap prune --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
        vmsnap prune --vm web1 --keep-within 30d --keep-tag release
        vmsnap gc""",
)
@_counted_options
@duration_option("--keep-within", "within_seconds", help="All that are no older, such as 12h, 30d, 2w, 1y.")
@click.option("--keep-tag", "keep_tags", metavar="TAG", multiple=True, help="All with this tag; may be repeated.")
@click.option("--vm", metavar="NAME", help="Look at the backups of this VM alone.")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Look at backups with one of these tags alone.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed, and why the others are kept.")
@by_agent(
    "prune",
    lambda within_seconds, keep_tags, vm, tags, dry_run, **counted: {
        **{f"keep_{rule}": count for rule, count in counted.items()},
        "keep_within_seconds": within_seconds,
        "keep_tags": keep_tags,
        "vm": vm,
        "tags": tags,
        "dry_run": dry_run,
    },
)
@pass_session
def prune(
    session: Session,
    /,
    within_seconds: int | None,
    keep_tags: tuple[str, ...],
    vm: str | None,
    tags: tuple[str, ...],
    dry_run: bool,
    **counted: int,
) -> None:
    """Remove the backups that no rule keeps.

    Each VM is looked at by itself; hours, days, weeks, months and years are those of UTC. The newest backup of a VM is
    always kept. What the backups took is free after vmsnap gc. Exit code 4 where a backup cannot be read: it is left
    alone.
    """
    from vmsnap.repository.retention import RetentionPolicy

    policy = RetentionPolicy(within_seconds=within_seconds, tags=frozenset(keep_tags), **counted)
    report = session.open_repository().prune(policy, vm, tags, dry_run)
    session.emit(_document(report), lambda: _show(report))
    for unread in report.unread[1:]:
        session.note(str(unread))
    if report.unread:
        raise report.unread[0]


@click.command(cls=SessionCommand, epilog="vmsnap forget web1-20260101T120000Z-1a2b3c -r /srv/backups")
@click.argument("backups", metavar="BACKUP...", nargs=-1, required=True)
@by_agent("forget", dict)
@pass_session
def forget(session: Session, backups: tuple[str, ...]) -> None:
    """Remove single backups, each named by its whole id.

    Where one of them is not there, none is removed. What they took is free after vmsnap gc.
    """
    from vmsnap.repository.pruning import forget_backups

    names = tuple(dict.fromkeys(backups))
    forget_backups(session.open_repository(), names)
    session.emit({"removed": list(names)}, lambda: click.echo(_removed(len(names))))


def _document(report: PruneReport) -> dict[str, Any]:
    return {
        "dry_run": report.dry_run,
        "kept": [{"backup": v.backup, "vm": v.vm, "time": v.time, "reasons": list(v.reasons)} for v in report.kept],
        "removed": [{"backup": v.backup, "vm": v.vm, "time": v.time} for v in report.removed],
        "unread": [unread.message for unread in report.unread],
    }


def _show(report: PruneReport) -> None:
    if report.verdicts:
        output.table(
            ("backup", "vm", "time", "", "why"),
            [
                (v.backup, v.vm, output.local_time(v.time), "keep" if v.kept else "remove", ", ".join(v.reasons))
                for v in report.verdicts
            ],
        )
        click.echo()
    if not report.removed:
        click.echo("nothing to remove")
    elif report.dry_run:
        click.echo(f"{_number(len(report.removed))} would be removed; nothing was changed")
    else:
        click.echo(_removed(len(report.removed)))


def _removed(count: int) -> str:
    return f"{_number(count)} removed; vmsnap gc frees the room"


def _number(count: int) -> str:
    return f"{count} backup" if count == 1 else f"{count} backups"
