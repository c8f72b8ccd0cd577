"""Serves the API and the page: on a UNIX socket, and over TLS where that is configured."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from vmsnap.agent.api.access import Door
from vmsnap.agent.api.app import create_app
from vmsnap.agent.api.context import Context
from vmsnap.agent.sdnotify import passed_sockets
from vmsnap.agent.settings import AgentSettings
from vmsnap.durable import make_folder
from vmsnap.errors import Busy, UsageError, VmsnapError

_STOPS_WITHIN_SECONDS = 3
_LOCAL_NAMES = ("localhost", "vmsnap")


class Servers:
    """The servers of one agent, each in a thread of its own."""

    def __init__(self, context: Context, settings: AgentSettings, socket_path: Path) -> None:
        """Open the sockets; nothing is answered yet.

        :raises Busy: another agent listens there
        :raises UsageError: certificate, key or address cannot be used
        """
        self._context = context
        self._threads: list[threading.Thread] = []
        self._servers: list[uvicorn.Server] = []
        self._path: Path | None = None
        names = frozenset(name.lower() for name in (*settings.names, *_LOCAL_NAMES))
        self.addresses: list[str] = []
        passed = [each for each in passed_sockets() if each.family == socket.AF_UNIX]
        sockets = passed or [self._bind(socket_path)]
        self._add(Door("http", names, trusted=True), sockets, None)
        self.addresses += [f"unix:{each.getsockname()}" for each in sockets]
        if settings.address:
            tls = _tls(settings)
            listening = _listen(*settings.address)
            host = socket.gethostname().lower()
            self._add(Door("https", names | {host, socket.getfqdn().lower()}, trusted=False), [listening], tls)
            self.addresses.append("https://{}:{}".format(*listening.getsockname()[:2]))

    def start(self) -> None:
        """Answer from now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop answering; requests that run have a few seconds. Blocks; idempotent."""
        self._context.stopping.set()
        for server in self._servers:
            server.should_exit = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_STOPS_WITHIN_SECONDS + 5)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def alive(self) -> bool:
        """Whether all of them still answer."""
        return all(thread.is_alive() for thread in self._threads)

    def _add(self, door: Door, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            create_app(self._context, door),
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_STOPS_WITHIN_SECONDS,
            h11_max_incomplete_event_size=64 << 10,
        )
        if tls is not None:
            config.load()
            config.ssl = tls
        server = uvicorn.Server(config)
        self._servers.append(server)
        run = threading.Thread(target=server.run, args=(list(sockets),), name=f"vmsnap-{door.scheme}", daemon=True)
        self._threads.append(run)

    def _bind(self, path: Path) -> socket.socket:
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            make_folder(path.parent)
            _remove_dead(path)
            # Nobody else may connect even for a moment.
            before = os.umask(0o177)
            try:
                found.bind(str(path))
            finally:
                os.umask(before)
            found.listen(128)
        except OSError as e:
            found.close()
            raise UsageError(f"cannot listen on {path}: {e.strerror or e}", cure="see 'socket' in [agent]") from e
        except VmsnapError:
            found.close()
            raise
        self._path = path
        return found


def _remove_dead(path: Path) -> None:
    if not path.is_socket():
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise Busy(f"another agent listens on {path}", cure="there is one agent for each state folder")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as e:
        raise UsageError(f"cannot listen on {host}:{port}: {e.strerror}", cure="see 'listen' in [agent]") from e
    return found


def _tls(settings: AgentSettings) -> ssl.SSLContext:
    if settings.certificate is None or settings.key is None:
        raise UsageError("there is no certificate", cure="see 'certificate' and 'key' in [agent]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"the certificate {settings.certificate} or its key cannot be used: {e}") from e
    return context
