"""What ``~/.ssh/config`` says of a host, as OpenSSH understands it: ``ssh -G`` is asked, which connects to nothing.

So aliases, ``Include``, ``Match`` and everything else there mean what they mean to ``ssh``. Without an ``ssh`` program
OpenSSH's defaults count, as long as there is no file that says otherwise.
"""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import DriverUnavailable, TransientStorageError, UsageError
from vmsnap_storage_backends.sftp.address import SftpAddress, parse_address

_ASK_SECONDS = 30.0
_IDENTITIES = ("id_rsa", "id_ecdsa", "id_ed25519")


@dataclass(frozen=True)
class HostSettings:
    """How a host is reached. `name` is what it was called; `key_name` what its host key is kept under, None for its
    name and port. `agent_socket` is None where no agent is to be asked. `jumps` are the hosts to go through, each as
    ``user@host:port``.
    """

    name: str
    host: str
    port: int
    user: str
    identity_files: tuple[Path, ...] = ()
    identities_only: bool = False
    agent_socket: str | None = None
    known_hosts: tuple[Path, ...] = ()
    key_name: str | None = None
    jumps: tuple[str, ...] = ()


def settings_of(address: SftpAddress, config_file: Path | None = None) -> HostSettings:
    """What is configured for a host; what the address says comes before it.

    :param config_file: instead of the user's and the system's own
    :raises UsageError: the configuration is wrong, or wants a ``ProxyCommand``
    :raises TransientStorageError: ssh does not say in time, or cannot be started
    :raises DriverUnavailable: there is a configuration, and no program to understand it
    """
    command = ["ssh", "-G"]
    command += ["-F", str(config_file)] if config_file else []
    command += ["-p", str(address.port)] if address.port else []
    command += ["-l", address.user] if address.user else []
    try:
        done = subprocess.run(
            [*command, "--", address.host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_ASK_SECONDS,
        )
    except FileNotFoundError as e:
        return _without_ssh(address, config_file, e)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise TransientStorageError(f"cannot ask ssh what is configured for {address.host}: {e}") from e
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UsageError(
            f"ssh cannot understand the configuration for {address.host}: {said[-1] if said else 'it failed'}",
            cure=f"see what: ssh -G {address.host}",
        )
    return parse_settings(address.host, done.stdout.decode("utf-8", "surrogateescape"))


def parse_settings(name: str, text: str) -> HostSettings:
    """The settings that ``ssh -G`` wrote: a keyword and its value in each line, some keywords several times.

    :raises UsageError: it wants a ``ProxyCommand``
    """
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        keyword, _, value = line.partition(" ")
        values.setdefault(keyword, []).append(value)

    def one(keyword: str, default: str = "") -> str:
        return values.get(keyword, [default])[0]

    if one("proxycommand", "none") != "none":
        raise UsageError(
            f"~/.ssh/config has a ProxyCommand for {name}, which only a shell can run",
            cure="write ProxyJump instead, which vmsnap follows",
        )
    host, port, user = one("hostname", name), int(one("port", "22")), one("user") or getpass.getuser()
    tokens = {"%": "%", "h": host, "n": name, "p": str(port), "r": user, "u": getpass.getuser(), "d": _home()}
    alias = one("hostkeyalias", "none")
    jumps = one("proxyjump", "none")
    files = " ".join(values.get("userknownhostsfile", []) + values.get("globalknownhostsfile", [])).split()
    return HostSettings(
        name=name,
        host=host,
        port=port,
        user=user,
        identity_files=tuple(_expanded(file, tokens) for file in values.get("identityfile", []) if file != "none"),
        identities_only=one("identitiesonly") == "yes",
        agent_socket=_agent(one("identityagent", "SSH_AUTH_SOCK"), tokens),
        known_hosts=tuple(_expanded(file, tokens) for file in files if file != "none"),
        key_name=None if alias == "none" else alias,
        jumps=() if jumps == "none" else tuple(jumps.split(",")),
    )


def jump_address(jump: str) -> SftpAddress:
    """The address of a host to go through: ``[user@]host[:port]`` or ``ssh://…``.

    :raises UsageError: it is none
    """
    return parse_address(f"sftp://{jump.removeprefix('ssh://').rstrip('/')}/~/.")


def _without_ssh(address: SftpAddress, config_file: Path | None, error: OSError) -> HostSettings:
    folder = Path(_home()) / ".ssh"
    for file in [config_file] if config_file else [folder / "config"]:
        if file.exists():
            raise DriverUnavailable(
                f"{file} says how hosts are reached, and there is no ssh program that understands it",
                cure="install openssh-client",
            ) from error
    return HostSettings(
        name=address.host,
        host=address.host,
        port=address.port or 22,
        user=address.user or getpass.getuser(),
        identity_files=tuple(folder / name for name in _IDENTITIES),
        agent_socket=os.environ.get("SSH_AUTH_SOCK"),
        known_hosts=(folder / "known_hosts", Path("/etc/ssh/ssh_known_hosts")),
    )


def _home() -> str:
    return str(Path("~").expanduser())


def _expanded(text: str, tokens: dict[str, str]) -> Path:
    return Path(_filled(text.strip('"'), tokens)).expanduser()


def _filled(text: str, tokens: dict[str, str]) -> str:
    """`text` with its tokens filled in (ssh_config(5), TOKENS); those that are not known here stay."""
    filled: list[str] = []
    pieces = iter(text.split("%"))
    filled.append(next(pieces))
    for piece in pieces:
        if not piece:  # %%
            filled.append("%" + next(pieces, ""))
            continue
        token = {**tokens, "l": socket.gethostname(), "L": socket.gethostname().partition(".")[0]}.get(piece[0])
        filled.append(f"%{piece}" if token is None else token + piece[1:])
    return "".join(filled)


def _agent(value: str, tokens: dict[str, str]) -> str | None:
    if value == "none":
        return None
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK")
    if value.startswith("$"):
        return os.environ.get(value[1:].strip("{}"))
    return str(_expanded(value, tokens))
