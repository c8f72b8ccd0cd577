"""Where a passphrase comes from: environment, file, command, configuration, and at last a prompt."""

from __future__ import annotations

import sys

import click

from vmsnap.configuration import Configuration
from vmsnap.errors import UsageError
from vmsnap.secret import from_command, from_environment, from_file

_CURE = "set VMSNAP_PASSPHRASE_FILE, VMSNAP_PASSPHRASE_COMMAND or VMSNAP_PASSPHRASE"


def find_passphrase(configuration: Configuration, name: str = "VMSNAP_PASSPHRASE") -> str | None:
    """The passphrase that environment or configuration give; None where they give none.

    :param name: of the variable; ``_FILE`` and ``_COMMAND`` behind it are others
    :raises UsageError: a file cannot be read or a command fails
    """
    found = from_environment(name, "passphrase")
    if found is not None:
        return found
    if configuration.passphrase_file:
        return from_file(configuration.passphrase_file, "passphrase")
    if configuration.passphrase_command:
        return from_command(configuration.passphrase_command, "passphrase")
    return None


def ask(url: str = "") -> str:
    """Ask at the terminal for the passphrase of a repository.

    :param url: which one it is, where there are several
    :raises UsageError: there is no terminal
    """
    if not can_ask():
        raise UsageError("the repository is encrypted and no passphrase was given", cure=_CURE)
    return str(click.prompt(f"Passphrase of {url}" if url else "Passphrase", hide_input=True, err=True))


def ask_for_new(*, may_be_empty: bool) -> str | None:
    """Ask at the terminal, twice, for the passphrase of a new repository; None where it is left empty.

    :raises UsageError: there is no terminal
    """
    if not can_ask():
        raise UsageError("encryption needs a passphrase", cure=_CURE)
    text = "Passphrase (empty: no encryption)" if may_be_empty else "Passphrase"
    given = click.prompt(
        text,
        hide_input=True,
        confirmation_prompt=True,
        err=True,
        default="" if may_be_empty else None,
        show_default=False,
    )
    return str(given) or None


def new_passphrase() -> str:
    """The new passphrase of a repository that has one: from the environment, at last from a prompt, twice.

    :raises UsageError: there is none and no terminal, a file cannot be read, or a command fails
    """
    found = from_environment("VMSNAP_NEW_PASSPHRASE", "passphrase")
    if found is not None:
        return found
    if not can_ask():
        raise UsageError(
            "no new passphrase was given",
            cure="set VMSNAP_NEW_PASSPHRASE_FILE, VMSNAP_NEW_PASSPHRASE_COMMAND or VMSNAP_NEW_PASSPHRASE",
        )
    return str(click.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True))


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()
