"""``vmsnap backup``: backs a running VM up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import not_yet
from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.errors import UsageError

if TYPE_CHECKING:
    from vmsnap.controller import BackupResult


def _only_live(ctx: click.Context, parameter: click.Parameter, value: str) -> None:
    if value != "live":
        raise UsageError(f"--mode {value} is not available in this version of vmsnap")


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap backup web1 -r /srv/backups
        vmsnap backup web1 -r /srv/backups --tag nightly --max-pause 0.5 --json""",
)
@click.argument("vm")
@click.option(
    "--mode",
    type=click.Choice(["live", "consistent"]),
    default="live",
    expose_value=False,
    callback=_only_live,
    help="live: memory and disks of one instant, the only mode of this version.",
)
@click.option(
    "--max-pause",
    metavar="SECONDS",
    type=float,
    default=5.0,
    show_default=True,
    help="Give up rather than let the guest stand still longer.",
)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="A word to find the backup by; any number of times.")
@click.option(
    "--accept-unencrypted",
    is_flag=True,
    help="Store the backup even if the repository was encrypted when this host last used it, and is not now.",
)
@not_yet("--keep-duplicate", is_flag=True)
@pass_session
def backup(session: Session, vm: str, max_pause: float, tags: tuple[str, ...], accept_unencrypted: bool) -> None:
    """Back up the registered VM whole: RAM, vCPUs and every disk, all from one instant.

    The guest stands still for milliseconds and goes on; whatever happens, it runs again. The backup is there when
    this command has ended with 0, and not before.
    """
    from vmsnap.cli.progress import progress_bar

    with session.controller() as controller:
        controller.table.get(vm)  # told before anybody is asked for a passphrase
        repository = session.open_repository()
        with progress_bar() as progress:
            result = controller.backup(
                vm,
                repository,
                max_pause_seconds=max_pause,
                tags=tags,
                accept_unencrypted=accept_unencrypted,
                progress=progress,
            )
    for warning in result.warnings:
        session.note(warning)
    session.emit(backup_document(result), lambda: _summary(result))


def backup_document(result: BackupResult) -> dict[str, Any]:
    """A finished backup as JSON shows it."""
    return {
        "backup": result.backup,
        "vm": result.vm,
        "mode": result.mode,
        "pause_seconds": result.pause_seconds,
        "read_bytes": result.read_bytes,
        "stored_bytes": result.stored_bytes,
        "seconds": result.seconds,
        "disks": [{"device": disk.device, "size_bytes": disk.size_bytes} for disk in result.disks],
        "memory_bytes": result.memory_bytes,
        "capture": result.capture,
        "warnings": list(result.warnings),
    }


def _summary(result: BackupResult) -> None:
    disks = ", ".join(f"{disk.device} {output.size(disk.size_bytes)}" for disk in result.disks) or "none"
    output.fields(
        [
            ("backup", result.backup),
            ("pause", f"{output.milliseconds(result.pause_seconds)}, by the hypervisor's own clock"),
            ("capture", result.capture),
            ("memory", output.size(result.memory_bytes)),
            ("disks", disks),
            ("read", output.size(result.read_bytes)),
            ("stored", output.size(result.stored_bytes)),
            ("took", f"{result.seconds:.1f} s"),
        ]
    )
