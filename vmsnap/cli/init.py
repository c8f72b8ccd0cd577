"""``vmsnap init``: makes a repository."""

from __future__ import annotations

import click

from vmsnap.cli.remote import by_agent
from vmsnap.cli.session import Session, SessionCommand, pass_session


@click.command(cls=SessionCommand, epilog="vmsnap init -r /srv/backups\nvmsnap init -r /srv/backups --encryption none")
@click.option(
    "--encryption",
    type=click.Choice(["none", "aes256-gcm"]),
    help="Default: aes256-gcm when a passphrase is given.",
)
@by_agent("init", dict)
@pass_session
def init(session: Session, encryption: str | None) -> None:
    """Make a repository in an empty place.

    The passphrase comes from VMSNAP_PASSPHRASE_FILE, VMSNAP_PASSPHRASE_COMMAND or VMSNAP_PASSPHRASE, or is asked for
    at the terminal. Without it nothing in the repository can be read: keep it somewhere else too.
    """
    make_repository(session, session.repository_url(), encryption)


def make_repository(session: Session, url: str, encryption: str | None) -> None:
    """Make the repository at `url` and report it."""
    from vmsnap.places import create_repository

    made = create_repository(
        url, _passphrase(session, encryption), encryption=encryption, options=session.options_of_storage(url)
    )

    def people() -> None:
        click.echo(f"repository {made.id} is made at {url}, encryption: {made.encryption}")

    if made.encryption == "none":
        session.note("the backups, guest RAM with all its secrets included, will be stored unencrypted")
    session.emit({"repository": url, "id": made.id, "encryption": made.encryption}, people)


def _passphrase(session: Session, encryption: str | None) -> str | None:
    from vmsnap.cli.passphrase import ask_for_new, can_ask, find_passphrase

    if encryption == "none":
        return None
    found = find_passphrase(session.configuration)
    if found is None and (encryption is not None or can_ask()):
        found = ask_for_new(may_be_empty=encryption is None)
    return found
