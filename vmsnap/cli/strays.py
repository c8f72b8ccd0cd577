"""``vmsnap strays``: what carries our tag and stands in no database."""

from __future__ import annotations

import click

from vmsnap.cli import output
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session


@click.command(
    cls=SessionCommand, epilog="vmsnap strays\nvmsnap strays --remove bk-20260101T120000Z-1a2b3c --remove /srv/x"
)
@click.option("--remove", "names", metavar="NAME", multiple=True, help="Remove the stray of that name; several times.")
@by_agent("strays", lambda names: {"remove": names})
@pass_session
def strays(session: Session, names: tuple[str, ...]) -> None:
    """List what carries our tag on this host and what its database does not know, or remove what you name.

    There is something only where the database was lost, damaged or put back to an older state, or where another state
    folder is in use: what crashes leave stands in the journal, and vmsnap recover removes it. Look twice: a VM that
    runs may be listed, and what is listed may be another state folder's. Drivers that cannot look now, such as that of
    an appliance that is off, are passed over and named.
    """
    passed_over: list[str] = []
    with session.controller() as controller:
        removed = controller.remove_strays(names) if names else []
        found = controller.strays(passed_over.append)
    for line in passed_over:
        session.note(f"passed over: {line}")

    def people() -> None:
        for each in removed:
            click.echo(f"{click.style('removed', bold=True)}  {each.kind} {output.printable(each.name)}")
        if found:
            output.table(("driver", "kind", "name"), [(each.driver, each.kind, each.name) for each in found])
        elif not removed:
            click.echo("the other drivers find no strays" if passed_over else "there are no strays")

    session.emit(
        {
            key: [{"driver": each.driver, "kind": each.kind, "name": each.name} for each in listed]
            for key, listed in (("strays", found), ("removed", removed))
        }
        | {"passed_over": passed_over},
        people,
    )
