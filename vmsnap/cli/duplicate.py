"""``vmsnap duplicate``: the duplicates that are held in memory; ``vmsnap failover``: one takes its VM's place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, SessionGroup, pass_session

if TYPE_CHECKING:
    from vmsnap.controller import DuplicateInfo, FailoverResult


@click.group(cls=SessionGroup)
def duplicate() -> None:
    """The duplicates that backup --keep-duplicate holds in memory: list them, discard them."""


@duplicate.command("list", short_help="List the duplicates that are held in memory.", epilog="vmsnap duplicate list")
@by_agent("duplicate-list", dict)
@pass_session
def list_duplicates(session: Session) -> None:
    """List the duplicates that are held in memory, the oldest first, with the memory that they really take.

    Those whose time is over are discarded now, and so is what a restart of the host has left of those from before it.
    """
    with session.controller() as controller:
        found = controller.duplicates(session.note)
    now = time.time()

    def people() -> None:
        output.table(
            ("duplicate", "vm", "backup", "state", "memory", "disks", "age", "expires in"),
            [
                (
                    each.duplicate,
                    each.vm,
                    each.backup,
                    each.state,
                    output.size(each.memory_bytes),
                    ", ".join(disk.device for disk in each.disks),
                    output.duration(now - each.held),
                    "-" if each.expires is None else output.duration(each.expires - now),
                )
                for each in found
            ],
            right=("memory", "age", "expires in"),
        )

    session.emit([duplicate_document(each, now) for each in found], people)


@duplicate.command(short_help="Remove a duplicate from memory.", epilog="vmsnap duplicate discard bk-0123456789")
@click.argument("name")
@by_agent("duplicate-discard", lambda name: {"duplicate": name})
@pass_session
def discard(session: Session, name: str) -> None:
    """Remove the duplicate NAME from memory, and its disks; its VM and its backup stay."""
    with session.controller() as controller:
        found = controller.discard_duplicate(name)
    session.emit(
        duplicate_document(found, time.time()),
        lambda: click.echo(f"{found.duplicate} is discarded, {output.size(found.memory_bytes)} of memory are free"),
    )


@click.command(cls=SessionCommand, epilog="vmsnap failover web1\nvmsnap failover web1 --fence --json")
@click.argument("vm")
@click.option("--fence", is_flag=True, help="Kill VM first if it lives; without it, one that lives is left alone.")
@by_agent("failover", dict)
@pass_session
def failover(session: Session, vm: str, fence: bool) -> None:
    """Let the duplicate of VM that is held in memory go on in its place.

    VM must not run, and that is shown, not assumed. The duplicate goes on from the instant of its backup, under the
    name of VM, on its own disks, its network connected; what VM did since then is lost to it, and stays on VM's old
    disks. Whatever fails, the duplicate and its disks are not removed.
    """
    with session.controller() as controller:
        result = controller.failover(vm, fence=fence)
    for warning in result.warnings:
        session.note(warning)
    session.emit(failover_document(result), lambda: _summary(result))


def duplicate_document(found: DuplicateInfo, now: float) -> dict[str, Any]:
    """A held duplicate as JSON shows it."""
    return {
        "duplicate": found.duplicate,
        "vm": found.vm,
        "backup": found.backup,
        "state": found.state,
        "memory_bytes": found.memory_bytes,
        "disks": [
            {"device": disk.device, "address": disk.address, "mechanism": disk.mechanism} for disk in found.disks
        ],
        "time": output.utc_time(int(found.held * 1e9)),
        "age_seconds": round(now - found.held, 3),
        "expires": None if found.expires is None else output.utc_time(int(found.expires * 1e9)),
    }


def failover_document(result: FailoverResult) -> dict[str, Any]:
    """A finished failover as JSON shows it."""
    return {
        "vm": result.vm,
        "state": result.state,
        "was": result.was,
        "fenced": result.fenced,
        "disks": [{"device": disk.device, "address": disk.address} for disk in result.disks],
        "duplicate": result.duplicate,
        "backup": result.backup,
        "instant": output.utc_time(int(result.instant * 1e9)),
        "seconds": result.seconds,
        "warnings": list(result.warnings),
    }


def _summary(result: FailoverResult) -> None:
    output.fields(
        [
            ("vm", f"{result.vm}, {result.state}"),
            ("was", f"{result.was}; {result.fenced}"),
            ("goes on", f"from {output.local_time(output.utc_time(int(result.instant * 1e9)))}"),
            ("from", f"duplicate {result.duplicate} of {result.backup}"),
            *(("disk", f"{disk.device} at {disk.address}") for disk in result.disks),
            ("took", f"{result.seconds:.2f} s to the running guest"),
        ]
    )
