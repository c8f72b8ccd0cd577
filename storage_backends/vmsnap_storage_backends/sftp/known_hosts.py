"""Whether a server is the one that it was: the ``known_hosts`` files of OpenSSH (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).

paramiko's own reader knows neither patterns nor revoked keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from vmsnap.errors import StorageError

_SSH_PORT = 22
_SIGNATURES = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}


class HostKeyRefused(StorageError):
    """The server's host key is not one that is trusted; nothing was sent but what everybody may see."""


@dataclass(frozen=True)
class KnownHost:
    """One line of a file. `marker` is empty, ``@revoked`` or ``@cert-authority``."""

    file: Path
    line: int
    marker: str
    names: str
    key_type: str
    key: bytes

    def is_for(self, name: str) -> bool:
        """Whether it speaks of the host that `host_name` names."""
        if self.names.startswith("|"):
            return _is_hash_of(self.names, name)
        found = False
        for pattern in self.names.lower().split(","):
            if pattern.startswith("!") and _matches(name, pattern[1:]):
                return False
            found = found or _matches(name, pattern)
        return found


def host_name(host: str, port: int) -> str:
    """What a host is called in the files: ``host``, or ``[host]:port`` where the port is not SSH's own."""
    return host.lower() if port == _SSH_PORT else f"[{host.lower()}]:{port}"


def fingerprint(key: bytes) -> str:
    """A key as ``ssh-keygen -l`` shows it."""
    return f"SHA256:{base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip('=')}"


class KnownHosts:
    """The host keys that are known to this user."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read them; those that do not exist are passed over.

        :raises HostKeyRefused: one cannot be read, and nobody knows what it would have said
        """
        self.files = tuple(files)
        self._lines: list[KnownHost] = []
        for file in files:
            try:
                self._lines += _lines_of(file)
            except FileNotFoundError:
                continue
            except OSError as e:
                raise HostKeyRefused(f"cannot read the host keys in {file}: {e.strerror}") from e

    def algorithms(self, name: str) -> list[str]:
        """The signature algorithms of the keys that are known for a host, so that the server is asked for one."""
        types = [line.key_type for line in self._lines if not line.marker and line.is_for(name)]
        return [algorithm for key_type in dict.fromkeys(types) for algorithm in _SIGNATURES.get(key_type, (key_type,))]

    def check(self, name: str, key_type: str, key: bytes) -> None:
        """Return if this is the key of the host.

        :raises HostKeyRefused: it is revoked, another one, or nobody has said that it is right
        """
        shown = f"{key_type} {fingerprint(key)}"
        mine = [line for line in self._lines if line.is_for(name)]
        for line in mine:
            if line.marker == "@revoked" and line.key == key:
                raise HostKeyRefused(
                    f"the host key of {name} ({shown}) is REVOKED in {line.file}, line {line.line}:"
                    " somebody else may have it",
                    cure="ask who runs the server for its new key",
                )
        known = [line for line in mine if not line.marker]
        if any(line.key == key for line in known):
            return
        if known:
            other = next((line for line in known if line.key_type == key_type), known[0])
            raise HostKeyRefused(
                f"THE HOST KEY OF {name} HAS CHANGED: it is {shown}, and {other.file}, line {other.line}, has"
                f" {other.key_type} {fingerprint(other.key)}: somebody may be between you and the server",
                cure=f"ask who runs it; only if the key was changed on purpose: ssh-keygen -R '{name}' -f {other.file}",
            )
        host, port = _split(name)
        raise HostKeyRefused(
            f"the host key of {name} is not known: {shown}",
            cure="compare that with what ssh-keygen -lf /etc/ssh/ssh_host_…_key.pub says on the server, and then: "
            f"ssh-keyscan -p {port} {host} >> {self.files[0] if self.files else '~/.ssh/known_hosts'}",
        )


def _lines_of(file: Path) -> Iterator[KnownHost]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            if len(words) < 3 or words[0].startswith("#"):
                continue
            try:
                key = base64.b64decode(words[2], validate=True)
            except (binascii.Error, ValueError):
                continue
            yield KnownHost(file, number, marker, words[0], words[1], key)


def _matches(name: str, pattern: str) -> bool:
    # Brackets stand for themselves there; only * and ? do not.
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def _is_hash_of(hashed: str, name: str) -> bool:
    """Whether ``|1|salt|hash`` is made of this name (OpenSSH's hostfile.c, host_hash)."""
    parts = hashed.split("|")
    if len(parts) != 4 or parts[1] != "1":
        return False
    try:
        salt, wanted = base64.b64decode(parts[2]), base64.b64decode(parts[3])
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), wanted)


def _split(name: str) -> tuple[str, str]:
    if name.startswith("["):
        host, _, port = name[1:].rpartition("]:")
        return host, port
    return name, str(_SSH_PORT)
