"""``vmsnap consolidate``: clean disks from a live backup."""

from __future__ import annotations

from pathlib import Path

import click

from vmsnap.cli import output
from vmsnap.cli.options import accept_loss, driver_options, limit_rate, shutdown_timeout
from vmsnap.cli.remote import by_agent, host_path
from vmsnap.cli.session import DriverCommand, Session, pass_session


@click.command(
    cls=DriverCommand,
    epilog="""\
        vmsnap consolidate web1-20260101T120000Z-1a2b3c --target /srv/clean
        vmsnap consolidate web1-20260101T120000Z-1a2b3c --target /srv/clean --store --json""",
)
@click.argument("backup")
@click.option(
    "--target",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the disks are made, one raw image each, named by device.",
)
@click.option("--store/--no-store", help="Store the disks as a new backup of mode consistent too.")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="A word to find that backup by; else those it had.")
@shutdown_timeout
@accept_loss
@driver_options
@limit_rate
@by_agent(
    "consolidate",
    lambda target, timeout, **same: {"target": host_path(target), "timeout_seconds": timeout, **same},
)
@pass_session
def consolidate(
    session: Session,
    backup: str,
    target: Path,
    store: bool,
    tags: tuple[str, ...],
    timeout: float,
    accept_loss: bool,
    options: dict[str, str],
) -> None:
    """Bring the live backup BACKUP up, shut its guest down in order, and leave its disks, clean, in DIR.

    It runs where nothing can reach it: on disks of its own, its network cut. What its applications had only in memory
    they have written by then. If the guest does not shut down, nothing is left.
    """
    from vmsnap.cli.progress import progress_bar

    with session.controller() as controller:
        repository = session.open_repository()
        with progress_bar() as progress:
            result = controller.consolidate(
                repository,
                backup,
                target.absolute(),
                store=store,
                tags=tags,
                timeout_seconds=timeout,
                options=options,
                accept_loss=accept_loss,
                progress=progress,
            )
    for warning in result.warnings:
        session.note(warning)
    stored = {"backup": result.backup, "stored_bytes": result.stored_bytes} if result.backup else {}
    document = {
        "disks": [{"device": disk.device, "address": disk.address} for disk in result.disks],
        "clean": result.clean,
        **stored,
        "source": result.source,
        "seconds": result.seconds,
        "warnings": list(result.warnings),
    }

    def people() -> None:
        output.fields(
            [
                ("from", result.source),
                *(("disk", f"{disk.device} at {disk.address}, clean") for disk in result.disks),
                *([("backup", result.backup)] if result.backup else []),
                ("took", f"{result.seconds:.1f} s"),
            ]
        )

    session.emit(document, people)
