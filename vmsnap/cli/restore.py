"""``vmsnap restore``: brings a backup up as a new VM."""

from __future__ import annotations

from pathlib import Path

import click

from vmsnap.cli import output
from vmsnap.cli.options import accept_loss, driver_options, limit_rate
from vmsnap.cli.remote import by_agent, host_path
from vmsnap.cli.session import DriverCommand, Session, pass_session


@click.command(
    cls=DriverCommand,
    epilog="""\
        vmsnap restore web1-20260101T120000Z-1a2b3c --as web1-copy --run --isolated
        vmsnap restore web1-20260101T120000Z-1a2b3c --as web1-copy --target /srv/vms/web1-copy""",
)
@click.argument("backup")
@click.option("--as", "name", metavar="NAME", required=True, help="The name of the new VM.")
@click.option("--run", is_flag=True, help="Let it execute, from the captured instant on; else it is left stopped.")
@click.option("--isolated", is_flag=True, help="Cut its network before it executes.")
@click.option(
    "--target",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where its disks are made; default: a folder of its own under the state folder.",
)
@accept_loss
@driver_options
@limit_rate
@by_agent("restore", lambda target, **same: {"target": host_path(target), **same})
@pass_session
def restore(
    session: Session,
    backup: str,
    name: str,
    run: bool,
    isolated: bool,
    target: Path | None,
    accept_loss: bool,
    options: dict[str, str],
) -> None:
    """Bring BACKUP up as the new VM NAME, on disks of its own.

    Nothing is overwritten: a name or a file that exists is refused. The VM is registered like any other.
    """
    from vmsnap.cli.progress import progress_bar

    with session.controller() as controller:
        repository = session.open_repository()
        with progress_bar() as progress:
            result = controller.restore(
                repository,
                backup,
                name,
                run=run,
                isolated=isolated,
                target=target.absolute() if target else None,
                options=options,
                accept_loss=accept_loss,
                progress=progress,
            )

    def people() -> None:
        output.fields(
            [
                ("vm", f"{result.vm}, {result.state}"),
                ("from", result.backup),
                *(("disk", f"{disk.device} at {disk.address}") for disk in result.disks),
                *(("option", f"-o {key}={value}") for key, value in result.options.items()),
                ("took", f"{result.seconds:.1f} s"),
            ]
        )

    document = {
        "vm": result.vm,
        "state": result.state,
        "disks": [{"device": disk.device, "address": disk.address} for disk in result.disks],
        "options": dict(result.options),
        "backup": result.backup,
        "seconds": result.seconds,
    }
    session.emit(document, people)
