"""``vmsnap key``: the passphrases that open the repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, SessionGroup, pass_session

if TYPE_CHECKING:
    from vmsnap.repository.keyring import KeyInfo


@click.group(cls=SessionGroup)
def key() -> None:
    """Add, list, remove and change the passphrases of a repository."""


@key.command(
    cls=SessionCommand,
    short_help="Let a further passphrase open the repository.",
    epilog="VMSNAP_NEW_PASSPHRASE_FILE=/etc/vmsnap/second vmsnap key add --label offsite -r /srv/backups",
)
@click.option("--label", metavar="TEXT", default="", help="Says what the key is for; not encrypted.")
@pass_session
def add(session: Session, label: str) -> None:
    """Let a further passphrase open the repository. No data is rewritten.

    The new passphrase comes from VMSNAP_NEW_PASSPHRASE_FILE, VMSNAP_NEW_PASSPHRASE_COMMAND or VMSNAP_NEW_PASSPHRASE,
    or is asked for at the terminal.
    """
    repository = session.open_repository()
    made = repository.add_key(session.new_passphrase(), label)
    session.emit({"id": made, "label": label}, lambda: click.echo(f"key {made} is added"))


@key.command("list", cls=SessionCommand, short_help="List the keys.", epilog="vmsnap key list -r /srv/backups")
@by_agent("key-list", dict)
@pass_session
def list_keys(session: Session) -> None:
    """List the keys; a star marks the one that your passphrase opens."""
    found = session.open_repository().keys()

    def people() -> None:
        output.table(
            ("", "key", "created", "label"),
            [("*" if k.opened else "", k.id, output.local_time(k.created), k.fault or k.label) for k in found],
        )

    session.emit([_document(info) for info in found], people)


@key.command(
    cls=SessionCommand, short_help="Remove a key.", epilog="vmsnap key remove 0123456789abcdef -r /srv/backups"
)
@click.argument("key_id", metavar="ID")
@by_agent("key-remove", lambda key_id: {"key": key_id})
@pass_session
def remove(session: Session, key_id: str) -> None:
    """Remove the key ID: its passphrase opens the repository no longer.

    The key that your own passphrase opens is not removed, so that one is left that somebody knows. Whoever has opened
    the repository before can have kept its root secret: to lock him out for good, make a new repository.
    """
    session.open_repository().remove_key(key_id)
    session.emit({"removed": key_id}, lambda: click.echo(f"key {key_id} is removed"))


@key.command(
    cls=SessionCommand,
    short_help="Change your passphrase.",
    epilog="vmsnap key change -r /srv/backups",
)
@pass_session
def change(session: Session) -> None:
    """Change your passphrase: the key that it opens gives way to one for the new passphrase.

    The new passphrase comes from VMSNAP_NEW_PASSPHRASE_FILE, VMSNAP_NEW_PASSPHRASE_COMMAND or VMSNAP_NEW_PASSPHRASE,
    or is asked for at the terminal. The old one goes when the new one has been seen to work. No data is rewritten.
    """
    repository = session.open_repository()
    made = repository.change_passphrase(session.new_passphrase())
    session.emit({"id": made}, lambda: click.echo(f"the passphrase is changed; its key is {made}"))


def _document(info: KeyInfo) -> dict[str, Any]:
    cost = info.cost
    return {
        "id": info.id,
        "created": info.created,
        "label": info.label,
        "opened": info.opened,
        "cost": cost and {"time_cost": cost.time_cost, "memory_kib": cost.memory_kib, "lanes": cost.lanes},
        "fault": info.fault,
    }
