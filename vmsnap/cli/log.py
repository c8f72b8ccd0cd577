"""``vmsnap log``: what was done on this host, a line an instruction."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import duration_option
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session

if TYPE_CHECKING:
    from vmsnap.oplog import LogLine

_COLOURS = {"failed": "red", "broken off": "red", "recovered": "yellow", "going on": "yellow"}


@click.command(cls=SessionCommand, epilog="vmsnap log\nvmsnap log web1 --since 1d\nvmsnap log --failed --json")
@click.argument("vm", required=False)
@duration_option("--since", "since_seconds", help="Only what began that long ago at most, such as 12h or 7d.")
@click.option("--failed", is_flag=True, help="Only operations that failed, were broken off or had to be recovered.")
@by_agent("log", dict)
@pass_session
def log(session: Session, vm: str | None, since_seconds: int | None, failed: bool) -> None:
    """Show what was done, of VM or of all VMs: every instruction with its duration and what came of it.

    The journal keeps 90 days. Times are local; --json has UTC.
    """
    from vmsnap.oplog import log_lines

    since_ns = 0 if since_seconds is None else time.time_ns() - since_seconds * 10**9
    with session.controller() as controller:
        lines = list(log_lines(controller.journal, vm, since_ns=since_ns))
    if failed:
        wanted = {line.operation for line in lines if line.bad or line.status == "recovered"}
        lines = [line for line in lines if line.operation in wanted]

    def people() -> None:
        for line in lines:
            click.echo(_text(line))

    session.emit([_document(line) for line in lines], people)


def _text(line: LogLine) -> str:
    when = output.local_time(output.utc_time(line.begun_ns))
    took = "" if line.seconds is None else f"{line.seconds:.3f} s"
    status = click.style(f"{line.status:11}", fg=_COLOURS.get(line.status))
    what = line.protocol if line.instruction == "end" else f"  {line.instruction}"
    return f"{when}  {line.vm:12}  {what:24}  {status}  {took:>10}  {output.printable(line.message)}".rstrip()


def _document(line: LogLine) -> dict[str, Any]:
    return {
        "time": output.utc_time(line.begun_ns),
        "seconds": line.seconds,
        "vm": line.vm,
        "operation": line.operation,
        "protocol": line.protocol,
        "backup": line.backup,
        "instruction": line.instruction,
        "status": line.status,
        "message": line.message,
    }
