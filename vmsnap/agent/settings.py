"""The ``[agent]`` table of the configuration file, read strictly.

::

    [agent]
    jobs_at_once = 2                     # on this host
    jobs_per_repository = 2
    jobs_per_pool = 2                    # on VMs with a disk in one mount point, volume group, zpool or server
    socket = "/run/vmsnap/agent.sock"    # default: agent.sock in the state folder
    listen = "0.0.0.0:8443"              # TCP too; only with certificate and key, and only with tokens
    certificate = "/etc/vmsnap/agent.crt"
    key = "/etc/vmsnap/agent.key"
    names = ["backup1.example.com"]      # what else the agent is called in URLs
    repositories = ["s3://far/copies"]   # which others jobs may use, beside the configured one and those of schedules

    [agent.notify.pager]                 # who is told of jobs that ended
    on = "failures"                      # or "all"
    webhook = "https://example.com/hook" # gets a POST of JSON
    secret_file = "/etc/vmsnap/hook"     # signs it: X-Vmsnap-Signature: sha256=HMAC

    [agent.notify.script]
    command = "/usr/local/bin/told --who vmsnap"  # gets the JSON on standard input; run without a shell

    [agent.notify.mail]
    email = "ops@example.com"
    sender = "vmsnap@example.com"
    smtp = "localhost:25"
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsnap.errors import UsageError
from vmsnap.places import refuse_secrets

_NOTICES = ("failures", "all")


@dataclass(frozen=True, kw_only=True)
class NoticeTarget:
    """One who is told of jobs that ended, by one of `webhook`, `command` and `email`; see the module."""

    on: str = "failures"
    webhook: str = ""
    secret_file: Path | None = None
    command: str = field(default="", repr=False)
    email: str = ""
    sender: str = "vmsnap@localhost"
    smtp: str = "localhost:25"


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """How the agent works; see the module."""

    jobs_at_once: int = 2
    jobs_per_repository: int = 2
    jobs_per_pool: int = 2
    socket: Path | None = None
    listen: str = ""
    certificate: Path | None = None
    key: Path | None = None
    names: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    notify: Mapping[str, NoticeTarget] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port to listen on; None for the UNIX socket alone.

        :raises UsageError: it is none
        """
        return host_and_port(self.listen, "agent.listen") if self.listen else None


def read_settings(table: Mapping[str, Any]) -> AgentSettings:
    """The settings that the table holds.

    :raises UsageError: an unknown key, a wrong value, or TCP without a certificate
    """
    notify = table.get("notify", {})
    for name, target in notify.items() if isinstance(notify, Mapping) else ():
        if isinstance(target, Mapping):
            _refuse_unknown(f"agent.notify.{name}", target, NoticeTarget)
    settings = _converted("agent", table, AgentSettings)
    for key in ("jobs_at_once", "jobs_per_repository", "jobs_per_pool"):
        if not 1 <= getattr(settings, key) <= 1000:
            raise UsageError(f"agent.{key} must be from 1 to 1000")
    if settings.address and not (settings.certificate and settings.key):
        raise UsageError(
            "agent.listen needs agent.certificate and agent.key: nothing is served on a network without TLS",
            cure="leave 'listen' out and use the UNIX socket, or name a certificate",
        )
    for url in settings.repositories:
        refuse_secrets(url)
    for name, target in settings.notify.items():
        _check_target(f"agent.notify.{name}", target)
    return settings


def host_and_port(text: str, what: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[address]:port``.

    :raises UsageError: it is something else
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) <= 65535 or not host:
        raise UsageError(f"{what}: {text!r} is not HOST:PORT", cure="such as 127.0.0.1:8443 or [::]:8443")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_target(where: str, target: NoticeTarget) -> None:
    if target.on not in _NOTICES:
        raise UsageError(f"{where}: on must be one of: {', '.join(_NOTICES)}")
    if sum(map(bool, (target.webhook, target.command, target.email))) != 1:
        raise UsageError(f"{where} must have one of webhook, command and email")
    if target.webhook and not target.webhook.startswith(("https://", "http://")):
        raise UsageError(f"{where}: webhook must be an http or https URL")
    if target.email:
        host_and_port(target.smtp, f"{where}.smtp")
        for address in (target.email, target.sender):
            if not address.isprintable() or "@" not in address or any(c in address for c in " <>,"):
                raise UsageError(f"{where}: {address!r} is no e-mail address")
    try:
        empty = bool(target.command) and not shlex.split(target.command)
    except ValueError:
        empty = True
    if empty:
        raise UsageError(f"{where}: command cannot be split into words")


def _refuse_unknown(where: str, table: Mapping[str, Any], kind: type[Any]) -> None:
    known = {each.name for each in dataclasses.fields(kind)}
    for key in sorted(set(table) - known):
        raise UsageError(f"[{where}] has no key {key!r}", cure=f"it has: {', '.join(sorted(known))}")


def _converted(where: str, table: Mapping[str, Any], kind: type[AgentSettings]) -> AgentSettings:
    import msgspec

    _refuse_unknown(where, table, kind)

    def path(wanted: type, value: object) -> object:
        if issubclass(wanted, Path) and isinstance(value, str) and Path(value).expanduser().is_absolute():
            return Path(value).expanduser()
        raise ValueError("must be an absolute path, or begin with ~")

    try:
        return msgspec.convert(dict(table), kind, dec_hook=path)
    except msgspec.ValidationError as e:
        raise UsageError(f"[{where}]: {e}", cure="see the documentation of the agent") from None
