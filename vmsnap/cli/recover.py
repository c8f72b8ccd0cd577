"""``vmsnap recover``: finishes or undoes what a crash left."""

from __future__ import annotations

import click

from vmsnap.cli import output
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session


@click.command(cls=SessionCommand, epilog="vmsnap recover\nvmsnap recover web1")
@click.argument("vm", required=False)
@by_agent("recover", dict)
@pass_session
def recover(session: Session, vm: str | None) -> None:
    """Finish or undo what a crash left, of VM or of all VMs.

    VMs that stand still because of us run again; snapshots, duplicates and half-made restores are removed. What
    cannot be reached is kept in the journal and named.
    """
    with session.controller() as controller:
        result = controller.recover(vm)

    def people() -> None:
        for what, lines in (("resumed", result.resumed), ("removed", result.removed), ("kept", result.kept)):
            for line in lines:
                click.echo(f"{click.style(what, bold=True)}  {output.printable(line)}")
        if not (result.resumed or result.removed or result.kept):
            click.echo("nothing was left")

    session.emit({"resumed": list(result.resumed), "removed": list(result.removed), "kept": list(result.kept)}, people)
