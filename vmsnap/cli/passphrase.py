"""Where a passphrase comes from: environment, file, command, configuration, and at last a prompt."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click

from vmsnap.configuration import Configuration
from vmsnap.errors import UsageError

_CURE = "set VMSNAP_PASSPHRASE_FILE, VMSNAP_PASSPHRASE_COMMAND or VMSNAP_PASSPHRASE"


def find_passphrase(given: str | None, configuration: Configuration) -> str | None:
    """The passphrase that environment or configuration give; None where they give none.

    :param given: the content of ``VMSNAP_PASSPHRASE``
    :raises UsageError: a file cannot be read or a command fails
    """
    if given:
        return given
    file, command = os.environ.get("VMSNAP_PASSPHRASE_FILE"), os.environ.get("VMSNAP_PASSPHRASE_COMMAND")
    if file:
        return _from_file(Path(file))
    if command:
        return _from_command(command)
    if configuration.passphrase_file:
        return _from_file(configuration.passphrase_file)
    if configuration.passphrase_command:
        return _from_command(configuration.passphrase_command)
    return None


def ask() -> str:
    """Ask at the terminal for the passphrase of a repository.

    :raises UsageError: there is no terminal
    """
    if not can_ask():
        raise UsageError("the repository is encrypted and no passphrase was given", cure=_CURE)
    return str(click.prompt("Passphrase", hide_input=True, err=True))


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


def new_passphrase(given: str | None) -> str:
    """The new passphrase of a repository that has one: from the environment, at last from a prompt, twice.

    :param given: the content of ``VMSNAP_NEW_PASSPHRASE``
    :raises UsageError: there is none and no terminal, a file cannot be read, or a command fails
    """
    if given:
        return given
    file, command = os.environ.get("VMSNAP_NEW_PASSPHRASE_FILE"), os.environ.get("VMSNAP_NEW_PASSPHRASE_COMMAND")
    if file:
        return _from_file(Path(file))
    if command:
        return _from_command(command)
    if not can_ask():
        raise UsageError(
            "no new passphrase was given",
            cure="set VMSNAP_NEW_PASSPHRASE_FILE, VMSNAP_NEW_PASSPHRASE_COMMAND or VMSNAP_NEW_PASSPHRASE",
        )
    return str(click.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True))


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _from_file(path: Path) -> str:
    try:
        text = path.read_text()
    except OSError as e:
        raise UsageError(f"cannot read the passphrase file {path}: {e.strerror}") from e
    except UnicodeDecodeError:
        raise UsageError(f"the passphrase file {path} is no UTF-8 text") from None
    return _checked(text, f"the passphrase file {path}")


def _from_command(command: str) -> str:
    # The command itself may hold a secret, so no message repeats it.
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise UsageError(f"the passphrase command cannot be split into words: {e}") from None
    if not words:
        raise UsageError("the passphrase command is empty")
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except OSError as e:
        raise UsageError(f"the passphrase command cannot be run: {e.strerror}") from None
    if done.returncode:
        raise UsageError(f"the passphrase command failed with status {done.returncode}")
    try:
        return _checked(done.stdout.decode(), "what the passphrase command gave")
    except UnicodeDecodeError:
        raise UsageError("what the passphrase command gave is no UTF-8 text") from None


def _checked(text: str, what: str) -> str:
    passphrase = text.rstrip("\r\n")
    if not passphrase:
        raise UsageError(f"{what} is empty")
    return passphrase
