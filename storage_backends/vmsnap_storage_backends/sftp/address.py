"""Where a repository on an SFTP server is: ``sftp://user@host:port/path``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from vmsnap.errors import UsageError

# Names, IPv4 and IPv6 addresses (with a zone); never an option of a program that is given one.
_HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
_USER = re.compile(r"[^-\x00-\x20\x7f][^\x00-\x20\x7f]*")
_SHAPE = "write sftp://user@host:port/path"


@dataclass(frozen=True)
class SftpAddress:
    """`host` is a name that ``~/.ssh/config`` may know otherwise; `port` and `user` are None where the URL leaves them
    to it. `path` begins with a slash, or is relative to the folder in which the server puts the user.
    """

    host: str
    port: int | None
    user: str | None
    path: str

    def __str__(self) -> str:
        """For people: never holds a password, as an address has none."""
        user = f"{quote(self.user)}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        path = self.path if self.path.startswith("/") else f"/~/{self.path}"
        return f"sftp://{user}{host}{port}{quote(path)}"


def parse_address(url: str) -> SftpAddress:
    """The address that a URL names. ``/~/path`` is relative to the folder in which the server puts the user.

    :raises UsageError: it names none, or holds a password, which is not repeated
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError("an sftp URL has a host or port that is none", cure=_SHAPE) from None
    # Before anything else, so that no other message shows it.
    if parts.password is not None:
        raise UsageError(
            "the sftp URL holds a password, which everybody on this host can see in the list of processes",
            cure="change that password; leave it out of the URL, and use a key or VMSNAP_SFTP_PASSWORD_FILE",
        )
    if parts.scheme != "sftp" or not parts.hostname:
        raise UsageError(f"{url!r} names no SFTP server", cure=_SHAPE)
    if parts.query or parts.fragment:
        raise UsageError(f"{url!r} has a '?' or '#'", cure="write %3F or %23")
    # urlsplit makes hosts lower case, which aliases of ~/.ssh/config need not be.
    host = unquote(parts.netloc.rpartition("@")[2])
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not _HOST.fullmatch(host):
        raise UsageError(f"{host!r} is no host name", cure=_SHAPE)
    user = unquote(parts.username) if parts.username else None
    if user is not None and not _USER.fullmatch(user):
        raise UsageError(f"{user!r} is no user name", cure=_SHAPE)
    return SftpAddress(host, port or None, user, _path(url, unquote(parts.path)))


def _path(url: str, path: str) -> str:
    if path in ("", "/", "/~", "/~/") or "\0" in path or "\n" in path:
        raise UsageError(f"{url!r} names no folder", cure=f"{_SHAPE}, or /~/path below the user's own folder")
    path = path.removeprefix("/~/") if path.startswith("/~/") else path
    words = [word for word in path.split("/") if word not in ("", ".")]
    return ("/" if path.startswith("/") else "") + "/".join(words)
