"""Where secrets come from: an environment variable ``NAME``, a file ``NAME_FILE``, or what a command ``NAME_COMMAND``
writes. Never a command line, which everybody on the host can read.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

from vmsnap.errors import UsageError

_SECRET = re.compile(r"VMSNAP_(?:[A-Z0-9]+_)*(?:PASSPHRASE|PASSWORD|TOKEN)")
_taken: dict[str, str] = {}


def take_from_environment() -> None:
    """Take the secrets out of this process's environment, so that the processes that it starts (guardians, VMs) do not
    get them; `from_environment` still finds them. Idempotent.
    """
    for name in [name for name in os.environ if _SECRET.fullmatch(name)]:
        _taken[name] = os.environ.pop(name)


def environment_with_secrets() -> dict[str, str]:
    """This process's environment with the secrets that were taken out of it: for a process of ours that does what this
    one was told to.
    """
    return {**os.environ, **_taken}


def from_environment(name: str, what: str) -> str | None:
    """The secret of that name; None where nobody gave one.

    :param name: such as ``VMSNAP_SFTP_PASSWORD``
    :param what: what messages call it: ``SFTP password``
    :raises UsageError: a file cannot be read, a command fails, or either gives nothing
    """
    given = os.environ.get(name) or _taken.get(name)
    if given:
        return given
    file, command = os.environ.get(f"{name}_FILE"), os.environ.get(f"{name}_COMMAND")
    if file:
        return from_file(Path(file), what)
    return from_command(command, what) if command else None


def from_file(path: Path, what: str) -> str:
    """The secret that a file holds; the end of its line does not count.

    :raises UsageError: it cannot be read, is no text, or is empty
    """
    try:
        text = path.read_text()
    except OSError as e:
        raise UsageError(f"cannot read the {what} file {path}: {e.strerror}") from e
    except UnicodeDecodeError:
        raise UsageError(f"the {what} file {path} is no UTF-8 text") from None
    return _checked(text, f"the {what} file {path}")


def from_command(command: str, what: str) -> str:
    """The secret that a command writes, run without a shell; its standard error is the terminal's.

    :raises UsageError: it cannot be run, fails, or writes nothing
    """
    # The command itself may hold a secret, so no message repeats it.
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise UsageError(f"the {what} command cannot be split into words: {e}") from None
    if not words:
        raise UsageError(f"the {what} command is empty")
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except OSError as e:
        raise UsageError(f"the {what} command cannot be run: {e.strerror}") from None
    if done.returncode:
        raise UsageError(f"the {what} command failed with status {done.returncode}")
    try:
        return _checked(done.stdout.decode(), f"what the {what} command gave")
    except UnicodeDecodeError:
        raise UsageError(f"what the {what} command gave is no UTF-8 text") from None


def _checked(text: str, what: str) -> str:
    secret = text.rstrip("\r\n")
    if not secret:
        raise UsageError(f"{what} is empty")
    return secret
