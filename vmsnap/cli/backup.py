"""``vmsnap backup``: backs a running VM up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import duration_option, limit_rate, shutdown_timeout
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session

if TYPE_CHECKING:
    from vmsnap.controller import BackupResult


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap backup web1 -r /srv/backups
        vmsnap backup web1 -r /srv/backups --tag nightly --max-pause 0.5 --json
        vmsnap backup web1 -r /srv/backups --mode consistent --on-timeout keep-live
        vmsnap backup web1 -r /srv/backups --keep-duplicate --keep-for 12h
        vmsnap backup web1 -r /srv/backups --freeze overlay""",
)
@click.argument("vm")
@click.option(
    "--mode",
    type=click.Choice(["live", "consistent"]),
    default="live",
    show_default=True,
    help="live: memory and disks of one instant. consistent: what was captured is run apart and shut down in order, and"
    " its disks are kept, without memory.",
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
@shutdown_timeout
@click.option(
    "--on-timeout",
    type=click.Choice(["fail", "keep-live"]),
    default="fail",
    show_default=True,
    help="With --mode consistent, what if the guest does not shut down: fail, or store the live backup instead.",
)
@click.option(
    "--keep-duplicate",
    is_flag=True,
    help="Hold what was captured in memory, for vmsnap failover; the one before it goes.",
)
@duration_option("--keep-for", help="With --keep-duplicate: discard it after so long, such as 12h or 30min.")
@click.option(
    "--freeze",
    type=click.Choice(["none", "overlay"]),
    default=None,
    help="overlay: take slow snapshots after the pause; what the guest writes meanwhile goes to an overlay, which is"
    " put back then.  [default: 'freeze' in the configuration, else none]",
)
@limit_rate
@by_agent(
    "backup",
    lambda max_pause, timeout, keep_for, **same: {
        "max_pause_seconds": max_pause,
        "timeout_seconds": timeout,
        "keep_for_seconds": keep_for,
        **same,
    },
)
@pass_session
def backup(
    session: Session,
    vm: str,
    mode: str,
    max_pause: float,
    tags: tuple[str, ...],
    accept_unencrypted: bool,
    timeout: float,
    on_timeout: str,
    keep_duplicate: bool,
    keep_for: int | None,
    freeze: str | None,
) -> None:
    """Back up the registered VM whole: RAM, vCPUs and every disk, all from one instant.

    The guest stands still for milliseconds and goes on; whatever happens, it runs again. The backup is there when
    this command has ended with 0, and not before.

    In mode consistent the captured machine runs on clones of its disks, where nothing can reach it, until its guest has
    shut down: file systems are clean and applications have written what they had in memory only. The VM itself does
    not notice.
    """
    from vmsnap.cli.progress import Telling, progress_bar

    with session.controller() as controller:
        controller.table.get(vm)  # told before anybody is asked for a passphrase
        repository = session.open_repository()
        with progress_bar() as bar:
            telling = Telling(bar, session.note)
            result = controller.backup(
                vm,
                repository,
                mode=mode,
                max_pause_seconds=max_pause,
                tags=tags,
                timeout_seconds=timeout,
                on_timeout=on_timeout,
                keep_duplicate=keep_duplicate,
                keep_seconds=keep_for,
                freeze=freeze or session.configuration.freeze or "none",
                accept_unencrypted=accept_unencrypted,
                progress=telling,
            )
    for warning in result.warnings:
        if warning not in telling.told:
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
        "duplicate": result.duplicate or None,
        "warnings": list(result.warnings),
    }


def _summary(result: BackupResult) -> None:
    disks = ", ".join(f"{disk.device} {output.size(disk.size_bytes)}" for disk in result.disks) or "none"
    output.fields(
        [
            ("backup", result.backup),
            *([("mode", result.mode)] if result.mode != "live" else []),
            ("pause", f"{output.milliseconds(result.pause_seconds)}, by the hypervisor's own clock"),
            ("capture", result.capture),
            *([("memory", output.size(result.memory_bytes))] if result.memory_bytes else []),
            ("disks", disks),
            ("read", output.size(result.read_bytes)),
            ("stored", output.size(result.stored_bytes)),
            *([("held", f"{result.duplicate}, in memory")] if result.duplicate else []),
            ("took", f"{result.seconds:.1f} s"),
        ]
    )
