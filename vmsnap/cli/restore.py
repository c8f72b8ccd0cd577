"""``vmsnap restore``: brings a backup up as a new VM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import accept_loss, driver_options, limit_rate
from vmsnap.cli.remote import by_agent, host_path
from vmsnap.cli.session import DriverCommand, Session, pass_session
from vmsnap.errors import UsageError

_ADDRESS = re.compile(r"(?:(?P<device>.+?)=)?(?P<address>[a-z][a-z0-9+.-]*://.+)")


def _places(targets: Sequence[str]) -> tuple[Path | None, dict[str, str]]:
    """The folder, and addresses by the devices that they are for: "" for the only disk.

    :raises UsageError: one is given twice
    """
    folders, onto = [], dict[str, str]()
    for target in targets:
        found = _ADDRESS.fullmatch(target)
        if found is None:
            folders.append(Path(target))
        elif found["device"] is None and len(targets) > 1:
            raise UsageError(f"which disk goes to {target}?", cure=f"say --target DISK={target}")
        elif (device := found["device"] or "") in onto:
            raise UsageError(f"--target places {device} twice")
        else:
            onto[device] = found["address"]
    if len(folders) > 1:
        raise UsageError("--target takes one folder", cure="single disks have addresses: --target DISK=iscsi://…")
    return folders[0] if folders else None, onto


def _for_the_agent(targets: Sequence[str]) -> dict[str, Any]:
    folder, onto = _places(targets)
    return {"target": host_path(folder), "onto": onto or None}


@click.command(
    cls=DriverCommand,
    epilog="""\
        vmsnap restore web1-20260101T120000Z-1a2b3c --as web1-copy --run --isolated
        vmsnap restore web1-20260101T120000Z-1a2b3c --as web1-copy --target /srv/vms/web1-copy
        vmsnap restore web1-20260101T120000Z-1a2b3c --as web1-copy --target iscsi://10.0.0.5:3260/iqn.2009-12.com.example:copy/1""",
)
@click.argument("backup")
@click.option("--as", "name", metavar="NAME", required=True, help="The name of the new VM.")
@click.option("--run", is_flag=True, help="Let it execute, from the captured instant on; else it is left stopped.")
@click.option("--isolated", is_flag=True, help="Cut its network before it executes.")
@click.option(
    "--target",
    "targets",
    metavar="[DISK=]PLACE",
    multiple=True,
    help="The folder where its disks are made; default: one of its own under the state folder. Or the address of a LUN"
    " (iscsi://PORTAL/IQN/LUN) onto which its disk, or of several this DISK, is written: what that holds is lost.",
)
@accept_loss
@driver_options
@limit_rate
@by_agent("restore", lambda targets, **same: {**_for_the_agent(targets), **same})
@pass_session
def restore(
    session: Session,
    backup: str,
    name: str,
    run: bool,
    isolated: bool,
    targets: tuple[str, ...],
    accept_loss: bool,
    options: dict[str, str],
) -> None:
    """Bring BACKUP up as the new VM NAME, on disks of its own.

    Nothing is overwritten but a LUN that --target names, and that nobody uses: a name or a file that exists is refused.
    The VM is registered like any other.
    """
    from vmsnap.cli.progress import progress_bar

    folder, onto = _places(targets)
    with session.controller() as controller:
        repository = session.open_repository()
        with progress_bar() as progress:
            result = controller.restore(
                repository,
                backup,
                name,
                run=run,
                isolated=isolated,
                target=folder.absolute() if folder else None,
                onto=onto,
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
