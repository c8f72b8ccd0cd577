"""``vmsnap drivers``: what is installed, whether it can be used here or what is missing, which options it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.remote import agent_option, by_agent, report_job
from vmsnap.cli.session import Session, SessionGroup, pass_session
from vmsnap.errors import DriverUnavailable

if TYPE_CHECKING:
    from vmsnap.registry import InstalledDriver

CAPABILITIES = ("clones", "changes", "remote", "reopens")
"""The flags of the roles' classes, see `vmsnap.roles`."""


@click.group(cls=SessionGroup, invoke_without_command=True, epilog="vmsnap drivers\nvmsnap drivers show qemu")
@agent_option
@click.pass_context
def drivers(ctx: click.Context) -> None:
    """List the installed drivers: what each can, and whether it can be used here or what is missing.

    A broken one is shown with what is wrong, and takes no other down. What is asked here is quick; vmsnap doctor looks
    closer.
    """
    if ctx.invoked_subcommand is not None:
        return
    from vmsnap.registry import installed

    session = ctx.ensure_object(Session)
    if session.agent:
        report_job(session, "drivers", {})
        return
    found = installed()
    session.emit([_document(driver) for driver in found], lambda: _list(found))


@drivers.command()
@click.argument("name")
@by_agent("drivers-show", lambda name: {"driver": name})
@pass_session
def show(session: Session, name: str) -> None:
    """Show the driver NAME: what it does and which options it takes with -o."""
    from vmsnap.registry import installed

    found = [driver for driver in installed() if driver.name == name]
    if not found:
        raise DriverUnavailable(f"no driver {name!r} is installed", cure="see: vmsnap drivers")
    # A list, since one name can stand for a driver of each kind.
    documents = [_full_document(driver) for driver in found]
    session.emit(documents, lambda: _show(documents))


def option_rows(driver: type[Any]) -> list[tuple[str, str]]:
    """The options of a driver's class, each with what the help says of it."""
    rows = []
    for option in driver.options:
        notes = [] if option.choices or option.type.name in ("text", "path", "yes or no") else [option.type.meaning]
        if option.required:
            notes.append("required")
        elif option.default is not None:
            notes.append(f"default: {option.default}")
        about = f"{option.help} [{'; '.join(notes)}]" if notes else option.help
        rows.append((f"-o {option.name}={option.metavar}", about))
    return rows


def capabilities(driver: type[Any]) -> list[str]:
    """What a driver's class says that it can, beyond what every driver of its role can."""
    return [name for name in CAPABILITIES if getattr(driver, name, False) is True]


def _usable(driver: InstalledDriver) -> str:
    if driver.problem:
        return f"no: {driver.problem}"
    return "; ".join(f"no: {lack.what} ({lack.cure})" for lack in driver.missing) or "yes"


def _document(driver: InstalledDriver) -> dict[str, Any]:
    return {
        "name": driver.name,
        "kind": driver.kind,
        "version": driver.version,
        "distribution": driver.distribution,
        "capabilities": [] if driver.driver is None else capabilities(driver.driver),
        "usable": driver.driver is not None and not driver.missing,
        "problem": driver.problem,
        "missing": [{"what": lack.what, "cure": lack.cure} for lack in driver.missing],
    }


def _full_document(driver: InstalledDriver) -> dict[str, Any]:
    options = [] if driver.driver is None else driver.driver.options
    return {
        **_document(driver),
        "summary": "" if driver.driver is None else _first_paragraph(driver.driver),
        "options": [
            {
                "name": option.name,
                "type": option.type.name,
                "help": option.help,
                "default": option.default,
                "choices": list(option.choices),
                "required": option.required,
            }
            for option in options
        ],
        "usage": [] if driver.driver is None else option_rows(driver.driver),
        "here": _usable(driver),
    }


def _first_paragraph(driver: type[Any]) -> str:
    return " ".join((driver.__doc__ or "").strip().partition("\n\n")[0].split())


def _list(found: list[InstalledDriver]) -> None:
    output.table(
        ("kind", "name", "version", "distribution", "can", "usable here"),
        [
            (
                driver.kind,
                driver.name,
                driver.version,
                driver.distribution,
                ", ".join(capabilities(driver.driver)) if driver.driver else "",
                _usable(driver),
            )
            for driver in found
        ],
    )


def _show(documents: list[dict[str, Any]]) -> None:
    for position, document in enumerate(documents):
        if position:
            click.echo()
        output.fields(
            [
                ("driver", document["name"]),
                ("kind", document["kind"]),
                ("distribution", f"{document['distribution']} {document['version']}"),
                ("usable here", document["here"]),
                *([("can", ", ".join(document["capabilities"]))] if document["capabilities"] else []),
                ("about", document["summary"]),
            ]
        )
        if document["usage"]:
            click.echo()
            output.table(("option", "meaning"), document["usage"])
        elif not document["problem"]:
            click.echo("\nIt has no options.")
