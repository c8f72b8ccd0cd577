"""``vmsnap export``: writes the disks of a backup as image files."""

from __future__ import annotations

from pathlib import Path

import click

from vmsnap.cli import output
from vmsnap.cli.session import Session, SessionCommand, pass_session


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap export web1-20260101T120000Z-1a2b3c --output /srv/images
        vmsnap export web1-20260101T120000Z-1a2b3c --output /srv/images --format qcow2 --disk disk0""",
)
@click.argument("backup")
@click.option(
    "--output",
    "folder",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the files are made; the folder is made where it is missing.",
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    show_default=True,
    help="qcow2 needs qemu-img.",
)
@click.option(
    "--disk",
    "devices",
    metavar="DEVICE",
    multiple=True,
    help="Only this disk; any number of times. Default: every disk.",
)
@pass_session
def export(session: Session, backup: str, folder: Path, image_format: str, devices: tuple[str, ...]) -> None:
    """Write the disks of BACKUP into DIR, one image file per disk, named by its device.

    Every file or none: what exists is refused, and a failure leaves nothing behind.
    """
    from vmsnap.cli.progress import byte_bar
    from vmsnap.controller.interruption import Interruption
    from vmsnap.export import export_disks

    repository = session.open_repository()
    with Interruption().handled(), byte_bar("writing") as progress:
        made = export_disks(repository, backup, folder, image_format=image_format, devices=devices, progress=progress)
    files = [{"device": device, "path": str(path)} for device, path in made.items()]
    session.emit({"files": files}, lambda: output.table(("device", "path"), [tuple(file.values()) for file in files]))
