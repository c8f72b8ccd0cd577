"""``vmsnap export``: writes the disks of a backup as image files, or one of them onto a disk that exists."""

from __future__ import annotations

from pathlib import Path

import click

from vmsnap.cli import output
from vmsnap.cli.options import accept_loss, limit_rate
from vmsnap.cli.remote import by_agent, host_path
from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.errors import UsageError


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap export web1-20260101T120000Z-1a2b3c --output /srv/images
        vmsnap export web1-20260101T120000Z-1a2b3c --output /srv/images --format qcow2 --disk disk0
        vmsnap export web1-20260101T120000Z-1a2b3c --disk disk0 --onto /dev/vg0/web1""",
)
@click.argument("backup")
@click.option(
    "--output",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the files are made; the folder is made where it is missing.",
)
@click.option(
    "--onto",
    "target",
    metavar="TARGET",
    type=click.Path(path_type=Path),
    help="Instead of --output: make this disk, which exists, like the one --disk. What it holds now is lost.",
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["raw", "qcow2"]),
    help="raw unless told otherwise. qcow2 needs qemu-utils.",
)
@click.option(
    "--disk",
    "devices",
    metavar="DEVICE",
    multiple=True,
    help="Only this disk; any number of times. Default: every disk.",
)
@accept_loss
@limit_rate
@by_agent(
    "export",
    lambda folder, target, image_format, devices, **same: {
        "output": host_path(folder),
        "onto": host_path(target),
        "format": image_format,
        "disks": devices,
        **same,
    },
)
@pass_session
def export(
    session: Session,
    backup: str,
    folder: Path | None,
    target: Path | None,
    image_format: str | None,
    devices: tuple[str, ...],
    accept_loss: bool,
) -> None:
    """Write the disks of BACKUP into DIR, one image file per disk, named by its device.

    Every file or none: what exists is refused, and a failure leaves nothing behind.

    With --onto, make TARGET like one disk of BACKUP: an image file or a block device that nobody uses. Only what
    differs is read from the repository and written. If that fails in the middle, TARGET is neither old nor new; the
    same command again finishes it.
    """
    if target is not None:
        if folder is not None or len(devices) != 1:
            raise UsageError("--onto takes exactly one --disk, and no --output")
        _write_onto(session, backup, devices[0], target.absolute(), image_format, accept_loss)
        return
    if folder is None:
        raise UsageError("where to write was not said", cure="give --output DIR, or --onto TARGET")
    from vmsnap.cli.progress import byte_bar
    from vmsnap.controller.interruption import Interruption
    from vmsnap.export import export_disks

    repository = session.open_repository()
    with Interruption().handled(), byte_bar("writing") as progress:
        made = export_disks(
            repository,
            backup,
            folder,
            image_format=image_format or "raw",
            devices=devices,
            accept_loss=accept_loss,
            progress=progress,
        )
    files = [{"device": device, "path": str(path)} for device, path in made.items()]
    session.emit({"files": files}, lambda: output.table(("device", "path"), [tuple(file.values()) for file in files]))


def _write_onto(
    session: Session, backup: str, device: str, target: Path, image_format: str | None, accept_loss: bool
) -> None:
    from vmsnap.cli.progress import byte_bar
    from vmsnap.controller.disk_use import disk_at_rest
    from vmsnap.controller.interruption import Interruption
    from vmsnap.overwrite import export_onto

    repository = session.open_repository()
    with (
        session.controller() as controller,
        disk_at_rest(controller, target, f"export of {backup}"),
        Interruption().handled(),
        byte_bar("writing") as progress,
    ):
        stats = export_onto(
            repository,
            backup,
            device,
            target,
            image_format=image_format,
            accept_loss=accept_loss,
            progress=progress,
        )

    def people() -> None:
        output.fields(
            [
                ("disk", f"{device} onto {target}"),
                ("compared", output.size(stats.compared_bytes)),
                ("written", output.size(stats.written_bytes)),
            ]
        )

    document = {
        "files": [{"device": device, "path": str(target)}],
        "compared_bytes": stats.compared_bytes,
        "written_bytes": stats.written_bytes,
    }
    session.emit(document, people)
