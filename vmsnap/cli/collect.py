"""``vmsnap gc``: frees the room of what no backup needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vmsnap.cli import output
from vmsnap.cli.options import duration_option, limit_rate
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session

if TYPE_CHECKING:
    from vmsnap.repository.gc import GcReport


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap gc -r /srv/backups --dry-run
        vmsnap gc -r /srv/backups""",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted.")
@duration_option(
    "--dead-after",
    "dead_after_seconds",
    help="Whoever was not heard of for so long is taken for dead, and no longer waited for. Default: 24h.",
)
@limit_rate
@by_agent("gc", dict)
@pass_session
def gc(session: Session, dry_run: bool, dead_after_seconds: int | None) -> None:
    """Delete what no backup needs any more, and write packs anew of which little is needed.

    May run beside backups and restores, on any host. What they may rely on is deleted by a later run, when they have
    ended: run it from time to time. Exit code 5 where another gc is at work.
    """
    from vmsnap.cli.progress import progress_bar
    from vmsnap.controller.interruption import Interruption
    from vmsnap.controller.progress import Progress
    from vmsnap.repository.sessions import DEAD_AFTER_SECONDS

    repository = session.open_repository()
    dead_after = DEAD_AFTER_SECONDS if dead_after_seconds is None else float(dead_after_seconds)
    with Interruption().handled(), progress_bar() as callback:
        report = repository.gc(
            lambda phase, done_bytes, total_bytes: callback(Progress(phase, done_bytes, total_bytes)),
            dead_after_seconds=dead_after,
            dry_run=dry_run,
        )
    session.emit(asdict(report), lambda: _show(report))


def _show(report: GcReport) -> None:
    for line in report.dead_sessions:
        click.echo(f"taken for dead: {output.printable(line)}")
    would = "would be " if report.dry_run else ""
    kept = f"{output.size(report.repacked_bytes)} of them kept"
    size_locked = output.size(report.locked_bytes)
    output.fields(
        [
            (f"{would}deleted", f"{report.packs_deleted} packs, {output.size(report.deleted_bytes)}"),
            (f"{would}written anew", f"{report.packs_repacked} packs, {kept}"),
            ("needed", f"{output.size(report.live_bytes)} by {report.backups} backups"),
            ("waiting", f"{report.packs_waiting} packs, {output.size(report.waiting_bytes)}"),
            *([("locked", f"{report.packs_locked} packs, {size_locked}")] if report.packs_locked else []),
        ]
    )
    for line in report.waiting_for:
        click.echo(f"waits for {output.printable(line)}")
    if report.waiting_for:
        click.echo("run vmsnap gc again when they have ended")
