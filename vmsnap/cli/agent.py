"""``vmsnap agent``: the service beside the hypervisor; its tokens, its catalogue, its systemd units."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from vmsnap.cli import output
from vmsnap.cli.options import duration_option
from vmsnap.cli.remote import agent_option, by_agent, client_of
from vmsnap.cli.session import Session, SessionGroup, pass_session
from vmsnap.errors import DamageFound, DriverUnavailable, UsageError, VmsnapError

if TYPE_CHECKING:
    from vmsnap.agent.house import Blueprint

_EXTRA_CURE = "pip install 'vmsnap[agent]'"


def blueprint_of(session: Session) -> Blueprint:
    """What the agent is made of, by the configuration.

    :raises UsageError: the configuration is wrong
    :raises DriverUnavailable: the extra is not installed
    """
    try:
        import cronsim  # noqa: F401
    except ImportError as e:
        raise DriverUnavailable(f"the agent is not installed: {e.name} is missing", cure=_EXTRA_CURE) from None
    from vmsnap.agent.house import Blueprint
    from vmsnap.agent.schedules import configured_schedules
    from vmsnap.agent.settings import read_settings

    configured = session.configuration
    return Blueprint(
        session.folders().state_dir,
        read_settings(configured.agent),
        configured_schedules(configured.schedules),
        absolute(session.named_repository() or ""),
    )


def absolute(url: str) -> str:
    """A repository's URL that means the same from every folder: a plain path is made absolute."""
    return str(Path(url).absolute()) if url and "://" not in url else url


def job_environment(session: Session, state_dir: Path) -> dict[str, str]:
    """The environment of jobs: ours, secrets included, and where state and configuration are."""
    from vmsnap.secret import environment_with_secrets

    found = {**environment_with_secrets(), "VMSNAP_STATE_DIR": str(state_dir)}
    ours = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "VMSNAP_REPOSITORY")
    for name in list(found):
        # A job that found an agent's URL would ask us to do it instead.
        if name in ours or name.startswith("VMSNAP_AGENT"):
            del found[name]
    if session.configuration.source is not None:
        found["VMSNAP_CONFIG"] = str(session.configuration.source.absolute())
    return found


@click.group(
    cls=SessionGroup,
    invoke_without_command=True,
    epilog="""\
        vmsnap agent
        vmsnap agent token add dashboard --role read --expires 90d
        vmsnap agent units --output /etc/systemd/system""",
)
@pass_session
@click.pass_context
def agent(ctx: click.Context, session: Session) -> None:
    """Run as a service: schedules, the API, the page. Without a subcommand it serves until SIGTERM."""
    if ctx.invoked_subcommand is not None:
        return
    try:
        from vmsnap.agent.service import Service
    except ImportError as e:
        raise DriverUnavailable(f"the agent is not installed: {e.name} is missing", cure=_EXTRA_CURE) from None
    blueprint = blueprint_of(session)
    Service(blueprint, job_environment(session, blueprint.state_dir), session.note).run()


@agent.command(short_help="Bring the catalogue of backups up to date.", epilog="vmsnap agent refresh -r /srv/backups")
@click.option("--all", "everything", is_flag=True, help="Read every manifest again, not those alone that are new.")
@by_agent("refresh", dict)
@pass_session
def refresh(session: Session, everything: bool) -> None:
    """Bring the agent's catalogue of backups up to date with the repository."""
    from vmsnap.agent.catalogue import Catalogue
    from vmsnap.cli.listing import full_document
    from vmsnap.repository.format import MANIFESTS_PREFIX, manifest_key

    url = absolute(session.repository_url())
    repository = session.open_repository()
    damaged: list[DamageFound] = []
    with session.controller() as controller:
        catalogue = Catalogue(controller.table.database)
        keys = [info.key for info in repository.storage.list(MANIFESTS_PREFIX)]
        known = catalogue.known(url)
        by_key = {manifest_key(backup): backup for backup in known}
        wanted = keys if everything else [key for key in keys if key not in by_key]
        entered = 0
        for begin in range(0, len(wanted), 1000):
            manifests = repository.manifests_at(wanted[begin : begin + 1000], damaged.append)
            catalogue.enter(url, map(full_document, manifests))
            entered += len(manifests)
        there = set(keys)
        gone = [backup for key, backup in by_key.items() if key not in there]
        catalogue.strike(url, gone)
    document = {"repository": url, "backups": len(keys), "entered": entered, "struck": len(gone)}
    session.emit(document, lambda: click.echo(f"{len(keys)} backups, {entered} entered, {len(gone)} struck out"))
    for damage in damaged[1:]:
        session.note(str(damage))
    if damaged:
        raise damaged[0]


@agent.command(short_help="Ask hypervisors for the tags of VMs.", epilog="vmsnap agent tags")
@by_agent("tags", dict)
@pass_session
def tags(session: Session) -> None:
    """Ask the hypervisors for the tags of all registered VMs, by which schedules may mean them (--vm tag:gold).

    A VM whose hypervisor does not answer keeps the tags that it had. The agent does this by itself from time to time.
    """
    from vmsnap.agent.tags import VmTags

    with session.controller() as controller:
        known = VmTags(controller.table.database)
        for row in controller.vms():
            if row.kind == "duplicate":
                continue
            try:
                with closing(controller.drivers.hypervisor(row.hypervisor, row.vm, row.options)) as driver:
                    known.enter(row.vm, driver.tags())
            except VmsnapError as e:
                session.note(f"{row.vm} keeps the tags that it had: {e}")
        document = [{"vm": vm, "tags": sorted(found)} for vm, found in sorted(known.all().items())]
    session.emit(
        document, lambda: output.table(("vm", "tags"), [(each["vm"], ", ".join(each["tags"])) for each in document])
    )


@agent.command(short_help="Write the systemd units.", epilog="vmsnap agent units --output /etc/systemd/system")
@click.option(
    "--output", "folder", metavar="DIR", type=click.Path(path_type=Path), help="Where; without it they are shown."
)
@pass_session
def units(session: Session, folder: Path | None) -> None:
    """Write the systemd units of the agent, for this installation of vmsnap. What exists is refused."""
    from importlib.resources import files

    program = Path(sys.argv[0]).absolute()
    found = {
        each.name: each.read_text().replace("/usr/bin/vmsnap", str(program))
        for each in sorted(files("vmsnap.agent").joinpath("units").iterdir(), key=lambda each: each.name)
        if each.name.startswith("vmsnap-agent.")
    }
    written: list[dict[str, Any]] = []
    for name, text in found.items():
        path = None if folder is None else folder / name
        if path is not None:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except OSError as e:
                raise UsageError(
                    f"cannot write {path}: {e.strerror}", cure="move it away, or choose another folder"
                ) from e
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
        written.append({"unit": name, "path": None if path is None else str(path), "text": text})

    def people() -> None:
        for each in written:
            click.echo(each["path"] or f"# {each['unit']}\n{each['text']}")

    session.emit(written, people)


@agent.group(cls=SessionGroup, short_help="Make, list and remove tokens.")
def token() -> None:
    """The tokens with which the API is used over TCP."""


@token.command("add", short_help="Make a token.", epilog="vmsnap agent token add dashboard --role read --expires 90d")
@click.argument("name")
@click.option("--role", type=click.Choice(["read", "operate", "admin"]), default="read", show_default=True)
@duration_option("--expires", help="How long it is good for, such as 90d; without it, until it is removed.")
@agent_option
@pass_session
def add_token(session: Session, name: str, role: str, expires: int | None) -> None:
    """Make the token NAME and show it, this once: what is kept is a digest."""
    from vmsnap.agent.tokens import Tokens

    if session.agent:
        asked = {"name": name, "role": role, "expires_seconds": expires}
        made = client_of(session).post("/tokens", asked)["token"]
    else:
        with session.controller() as controller:
            made = Tokens(controller.table.database).add(name, role, expires)
    session.emit({"name": name, "role": role, "token": made}, lambda: click.echo(made))


@token.command("list", short_help="List the tokens.")
@agent_option
@pass_session
def list_tokens(session: Session) -> None:
    """List the tokens, without what they are."""
    from vmsnap.agent.tokens import Tokens, token_document

    if session.agent:
        document = client_of(session).get("/tokens")["items"]
    else:
        with session.controller() as controller:
            document = [token_document(token) for token in Tokens(controller.table.database).rows()]

    def people() -> None:
        output.table(
            ("name", "role", "made", "expires", "expired"),
            [
                (each["name"], each["role"], _when(each["created"]), _when(each["expires"]), _yes(each["expired"]))
                for each in document
            ],
        )

    session.emit(document, people)


@token.command("remove", short_help="Remove a token.")
@click.argument("name")
@agent_option
@pass_session
def remove_token(session: Session, name: str) -> None:
    """Remove the token NAME: what is asked with it from now on is refused."""
    from vmsnap.agent.tokens import Tokens

    if session.agent:
        client_of(session).delete(f"/tokens/{quote(name, safe='')}")
    else:
        with session.controller() as controller:
            Tokens(controller.table.database).remove(name)
    session.emit({"name": name}, lambda: click.echo(f"{name} is removed"))


def _when(utc: object) -> str:
    return "-" if utc is None else output.local_time(str(utc))


def _yes(value: object) -> str:
    return "yes" if value else ""
