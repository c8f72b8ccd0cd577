"""Who we are to the server: keys of the agent, keys in files, and a password at last."""

from __future__ import annotations

import base64
import binascii
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from cryptography.exceptions import UnsupportedAlgorithm
from paramiko import AuthenticationException, BadAuthenticationType, PKey, SSHException, Transport
from paramiko.agent import AgentKey, AgentSSH
from paramiko.pkey import UnknownKeyType

from vmsnap.errors import StorageError
from vmsnap.secret import from_environment
from vmsnap_storage_backends.sftp.settings import HostSettings

PASSWORD = "VMSNAP_SFTP_PASSWORD"
KEY_PASSPHRASE = "VMSNAP_SFTP_KEY_PASSPHRASE"
_AGENT_SECONDS = 10.0


class AuthenticationRefused(StorageError):
    """The server takes none of the keys and passwords that we have."""


class _Agent(AgentSSH):
    """The keys of an agent whose socket is known; paramiko's own class knows ``SSH_AUTH_SOCK`` alone."""

    def __init__(self, path: str) -> None:
        super().__init__()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_AGENT_SECONDS)
        try:
            connection.connect(path)
            # The class has no public way to be given a connection.
            cast(Any, self)._connect(connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Let go of it."""
        cast(Any, self)._close()


def authenticate(transport: Transport, settings: HostSettings) -> None:
    """Become `settings.user` on the server.

    Tried in the order of OpenSSH: keys of the agent (with ``IdentitiesOnly`` those alone whose ``.pub`` file is
    configured), key files (the passphrase of encrypted ones from ``VMSNAP_SFTP_KEY_PASSPHRASE``), and the password of
    ``VMSNAP_SFTP_PASSWORD``; both may have ``_FILE`` or ``_COMMAND`` behind.

    :raises AuthenticationRefused: none of them is taken; the message says what was tried
    :raises UsageError: a secret cannot be read
    :raises SSHException, EOFError, OSError: the connection broke
    """
    tried: list[str] = []
    for described, key in _keys(settings, tried):
        if _is_taken(transport, settings, described, key, tried):
            return
    password = from_environment(PASSWORD, "SFTP password")
    if password is not None:
        try:
            transport.auth_password(settings.user, password)
            return
        except BadAuthenticationType:
            tried.append("the password (the server takes none)")
        except AuthenticationException:
            tried.append("the password")
    raise AuthenticationRefused(
        f"{settings.host}:{settings.port} does not let {settings.user} in; tried: {', '.join(tried) or 'nothing'}",
        cure=f"put a public key into that user's authorized_keys, or set {PASSWORD}_FILE; "
        f"encrypted keys need ssh-agent or {KEY_PASSPHRASE}_FILE",
    )


def _is_taken(transport: Transport, settings: HostSettings, described: str, key: PKey, tried: list[str]) -> bool:
    try:
        left = transport.auth_publickey(settings.user, key)
    except BadAuthenticationType:
        tried.append(f"{described} (the server takes no keys)")
        return False
    except AuthenticationException as e:
        tried.append(described)
        if not transport.is_active():
            raise AuthenticationRefused(
                f"{settings.host}:{settings.port} does not let {settings.user} in; tried: {', '.join(tried)}",
                cure="it takes no more tries: name the right key with IdentityFile and IdentitiesOnly in ~/.ssh/config",
            ) from e
        return False
    if left:
        tried.append(f"{described} (the server wants {' and '.join(left)} too)")
    return transport.is_authenticated()


def _keys(settings: HostSettings, tried: list[str]) -> Iterator[tuple[str, PKey]]:
    """The keys to try, and what they are called; notes those in `tried` that cannot be used."""
    configured = {file: blob for file in settings.identity_files if (blob := _public(file)) is not None}
    offered: set[bytes] = set()
    if settings.agent_socket:
        try:
            agent = _Agent(settings.agent_socket)
        except (OSError, SSHException, EOFError):
            tried.append("the agent (it does not answer)")
        else:
            with closing(agent):
                # The configured ones first: servers take few tries.
                keys = sorted(agent.get_keys(), key=lambda key: key.asbytes() not in configured.values())
                for key in keys:
                    if key.asbytes() in configured.values() or not settings.identities_only:
                        offered.add(key.asbytes())
                        yield f"the agent's key {_name(key)}", key
    for file in settings.identity_files:
        if configured.get(file) not in offered and file.exists():
            try:
                yield f"the key {file}", _load(file)
            except _Unusable as e:
                tried.append(f"the key {file} ({e})")


class _Unusable(Exception):
    """A key file that cannot be used; the message says why."""


def _load(file: Path) -> PKey:
    passphrase: str | None = None
    try:
        try:
            return PKey.from_path(file)
        except TypeError:  # so the library says that it is encrypted
            passphrase = from_environment(KEY_PASSPHRASE, "SSH key passphrase")
        if passphrase is None:
            raise _Unusable("it is encrypted, and no passphrase was given")
        # Its annotation says a text, what it calls wants bytes.
        return PKey.from_path(file, cast(Any, passphrase.encode()))
    except OSError as e:
        raise _Unusable(e.strerror or "it cannot be read") from None
    except (ValueError, TypeError, SSHException, UnknownKeyType, UnsupportedAlgorithm):
        raise _Unusable("the passphrase does not open it" if passphrase else "it is no key that can be used") from None


def _public(file: Path) -> bytes | None:
    """What the ``.pub`` file beside a key holds; None where there is none."""
    for candidate in (file, file.with_name(file.name + ".pub")):
        if candidate.suffix == ".pub":
            try:
                return base64.b64decode(candidate.read_text().split()[1])
            except (OSError, UnicodeDecodeError, IndexError, binascii.Error):
                continue
    return None


def _name(key: AgentKey) -> str:
    return str(getattr(key, "comment", "")) or str(key.get_name())
