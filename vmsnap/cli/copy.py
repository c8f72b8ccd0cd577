"""``vmsnap copy``: backups from one repository into another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmsnap.cli import output
from vmsnap.cli.options import limit_rate
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsnap.repository.copying import CopyReport


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap copy --from /srv/backups --to sftp://vault@far.example/srv/copies
        vmsnap copy --to s3://bucket/copies --vm web1
        vmsnap copy --from /srv/backups --to /mnt/usb web1-20260101T120000Z-1a2b3c""",
)
@click.argument("backups", nargs=-1, metavar="[BACKUP]...")
@click.option("--from", "source_url", metavar="URL", help="Where the backups are. Default: as for -r.")
@click.option("--to", "target_url", metavar="URL", required=True, help="The repository that is to have them too.")
@click.option("--vm", metavar="NAME", help="Copy the backups of this VM alone.")
@click.option("--dry-run", is_flag=True, help="Change nothing, only say what would be copied.")
@click.option(
    "--accept-unencrypted", is_flag=True, help="Go on where an unencrypted repository took an encrypted one's place."
)
@limit_rate
@by_agent("copy", lambda source_url, target_url, **same: {**_source(source_url), "to": target_url, **same})
@pass_session
def copy(
    session: Session,
    backups: Sequence[str],
    source_url: str | None,
    target_url: str,
    vm: str | None,
    dry_run: bool,
    accept_unencrypted: bool,
) -> None:
    """Copy the backups that are named, or all, from one repository into another that was made before.

    What the other repository has is neither read nor stored again; a copy that was interrupted goes on where it was.
    Each repository keeps its own keys. Passphrases come from VMSNAP_FROM_PASSPHRASE and VMSNAP_TO_PASSPHRASE, each with
    _FILE or _COMMAND behind too; where there is none, from where they come for every command.
    """
    from vmsnap.cli.progress import byte_bar
    from vmsnap.repository.copying import copy_backups

    source = session.open_place(source_url or session.repository_url(), "VMSNAP_FROM_PASSPHRASE")
    target = session.open_place(target_url, "VMSNAP_TO_PASSPHRASE")
    with session.controller() as controller:
        controller.see_the_place(target, accept_unencrypted=accept_unencrypted)
        with controller.interruption.handled(), byte_bar("copying") as progress:
            report = copy_backups(source, target, backups, vm=vm, progress=progress, dry_run=dry_run)
    document = {
        "from": source.storage.url,
        "to": target.storage.url,
        "dry_run": report.dry_run,
        "copied": [
            {
                "backup": each.backup,
                "vm": each.vm,
                "size_bytes": each.size_bytes,
                "read_bytes": each.read_bytes,
                "stored_bytes": each.stored_bytes,
                "seconds": each.seconds,
            }
            for each in report.copied
        ],
        "present": list(report.present),
        "damaged": [{"backup": backup, "message": message} for backup, message in report.damaged],
    }
    session.emit(document, lambda: _show(report))
    report.raise_if_damaged()


def _source(url: str | None) -> dict[str, str]:
    return {"repository": url} if url else {}


def _show(report: CopyReport) -> None:
    for each in report.copied:
        did = "would copy" if report.dry_run else "copied"
        moved = (
            "" if report.dry_run else f", {output.size(each.read_bytes)} read, {output.size(each.stored_bytes)} stored"
        )
        click.echo(f"{did}  {output.printable(each.backup)}: {output.size(each.size_bytes)}{moved}")
    for backup, message in report.damaged:
        click.echo(f"{click.style('damaged', fg='red')}  {output.printable(f'{backup}: {message}')}")
    if not report.copied and not report.damaged:
        click.echo("nothing to copy")
    if report.present:
        click.echo(f"{len(report.present)} were there already")
