"""A connection to an SFTP server: through the hosts in between, to a server whose key is known, as a user it knows."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from paramiko import Channel, SSHException, Transport

from vmsnap.errors import StorageError, UsageError
from vmsnap_storage_backends.sftp.address import SftpAddress
from vmsnap_storage_backends.sftp.authentication import authenticate
from vmsnap_storage_backends.sftp.conversation import Conversation, Lost
from vmsnap_storage_backends.sftp.known_hosts import KnownHosts, host_name
from vmsnap_storage_backends.sftp.pieces import Pieces
from vmsnap_storage_backends.sftp.settings import HostSettings, jump_address, settings_of

if TYPE_CHECKING:
    from paramiko.buffered_pipe import BufferedPipe

# One of SSH's messages may have 32 KiB from every client; larger ones halve what Python does for each byte. OpenSSH
# takes 256 KiB (packet.c, PACKET_MAX_SIZE) with all that is around the data.
_PACKET_BYTES = 255 << 10
# How far the server may run ahead of us.
_WINDOW_BYTES = 32 << 20
# What is received at once, if there is so much.
_RECEIVE_BYTES = 1 << 20
# Whatever is shorter may be all that comes until we have acknowledged it.
_SMALL_BYTES = 4096
# After so much keys are exchanged anew (RFC 4253, section 9).
_REKEY_BYTES = 1 << 30
# AES-GCM is one pass in C, and twice as fast as the other ciphers with their separate checksums.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr", "aes192-ctr")
_DIGESTS = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
)
_KEEPALIVE_SECONDS = 20
_MOST_JUMPS = 8
_LOG = "vmsnap.sftp"


class Unreachable(StorageError):
    """The server cannot be connected to."""


class _ImpatientSocket:
    """A socket, or a channel through another host, whose peer must take or give something now and then.

    paramiko waits for ever for a peer that takes nothing more, whatever time-outs its channels have. And it asks for a
    few bytes, then for those of one message, and puts together what comes of them anew with each part: much is received
    at once here, and it finds its messages whole.
    """

    def __init__(self, inner: socket.socket | Channel, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds
        self._stuck_since: float | None = None
        self._closed = False  # which paramiko looks at, as sockets have it
        # One piece of memory for all: what is new each time must be got from the system page by page.
        self._room = memoryview(bytearray(_RECEIVE_BYTES))
        self._received = self._room[:0]

    def send(self, data: bytes) -> int:
        """As a socket's, whose time-out is short.

        :raises ConnectionError: the peer has taken nothing for too long
        """
        try:
            count = self._inner.send(data)
        except TimeoutError:
            now = time.monotonic()
            self._stuck_since = self._stuck_since or now
            if now - self._stuck_since > self._seconds:
                raise ConnectionError("the server takes nothing more") from None
            raise
        self._stuck_since = None
        return count

    def recv(self, count: int) -> bytes:
        """As a socket's."""
        if not self._received:
            if isinstance(self._inner, Channel):
                return self._inner.recv(count)
            self._received = self._room[: self._inner.recv_into(self._room)]
            if len(self._received) < _SMALL_BYTES:
                # sshd holds its next small message back until then: 40 ms at the opening of a session.
                self._inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        part, self._received = self._received[:count], self._received[count:]
        return bytes(part)

    def settimeout(self, seconds: float | None) -> None:
        """As a socket's."""
        self._inner.settimeout(seconds)

    def close(self) -> None:
        """As a socket's."""
        self._closed = True
        self._inner.close()


class Connection:
    """A conversation, and the transports that carry it."""

    def __init__(self, talk: Conversation, transports: Sequence[Transport]) -> None:
        self.talk = talk
        self._transports = tuple(transports)

    def is_usable(self) -> bool:
        """Whether it has not been seen to be broken."""
        return not self.talk.lost and all(transport.is_active() for transport in self._transports)

    def close(self) -> None:
        """End it; idempotent, does not wait for the server."""
        self.talk.lost = True
        for transport in reversed(self._transports):
            transport.close()


def connect(address: SftpAddress, config_file: Path | None, seconds: float) -> Connection:
    """Connect and begin a conversation.

    :param seconds: how long the server may be silent, now and later
    :raises UsageError: the configuration is wrong
    :raises HostKeyRefused: it may be another server
    :raises AuthenticationRefused: it does not know us
    :raises Unreachable: no connection comes about, and it makes no sense to try again
    :raises Lost: no connection comes about now
    """
    logging.getLogger(_LOG).addHandler(logging.NullHandler())
    logging.getLogger(_LOG).propagate = False
    transports: list[Transport] = []
    try:
        settings = settings_of(address, config_file)
        _go_through(settings, config_file, seconds, transports, _MOST_JUMPS)
        transport = transports[-1]
        channel = transport.open_session(_WINDOW_BYTES, _PACKET_BYTES, timeout=seconds)
        channel.settimeout(seconds)
        pieces = Pieces()
        channel.in_buffer = cast("BufferedPipe[bytes]", pieces)
        try:
            channel.invoke_subsystem("sftp")
        except SSHException as e:
            raise Unreachable(
                f"{settings.host} offers no SFTP to {settings.user}",
                cure="let its sshd have: Subsystem sftp internal-sftp",
            ) from e
        in_order = "OpenSSH" in transport.remote_version
        return Connection(Conversation(channel, in_order=in_order, gather=pieces.gather), transports)
    except (SSHException, EOFError, OSError) as e:
        _close(transports)
        raise Lost(_reason(address, e)) from e
    except BaseException:
        _close(transports)
        raise


def _go_through(
    settings: HostSettings, config_file: Path | None, seconds: float, transports: list[Transport], left: int
) -> None:
    """Connect to a host, and before that to those that lie before it; each new transport is put into the list.

    :raises Lost, Unreachable: see `connect`
    """
    if not left:
        raise UsageError(f"ProxyJump leads through more than {_MOST_JUMPS} hosts, or in a circle")
    for number, jump in enumerate(settings.jumps):
        hop = settings_of(jump_address(jump), config_file)
        # Only the first is not yet told how it is reached.
        hop = hop if number == 0 else HostSettings(**{**vars(hop), "jumps": ()})
        _go_through(hop, config_file, seconds, transports, left - 1)
    socket_like: socket.socket | Channel
    if transports:
        target = (settings.host, settings.port)
        socket_like = transports[-1].open_channel("direct-tcpip", target, ("127.0.0.1", 0), timeout=seconds)
    else:
        socket_like = _dial(settings, seconds)
    transport = _transport(_ImpatientSocket(socket_like, seconds))
    transports.append(transport)
    known, name = KnownHosts(settings.known_hosts), settings.key_name or host_name(settings.host, settings.port)
    _prefer(transport, known.algorithms(name))
    for attribute in ("banner_timeout", "handshake_timeout", "auth_timeout", "channel_timeout"):
        setattr(transport, attribute, seconds)
    transport.start_client(timeout=seconds)
    if not transport.initial_kex_done:
        raise Lost(f"{settings.host}:{settings.port} does not answer")
    key = transport.get_remote_server_key()
    known.check(name, key.get_name(), key.asbytes())
    authenticate(transport, settings)
    transport.set_keepalive(_KEEPALIVE_SECONDS)


def _dial(settings: HostSettings, seconds: float) -> socket.socket:
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.create_connection((settings.host, settings.port), timeout=seconds)
    except socket.gaierror as e:
        if e.errno == socket.EAI_AGAIN:
            raise Lost(f"the name {settings.host} cannot be looked up now") from e
        raise Unreachable(
            f"there is no host of the name {settings.host}", cure="correct the URL, or ask who runs DNS"
        ) from e
    except ConnectionRefusedError as e:
        raise Lost(f"nothing listens at {where}") from e
    except TimeoutError as e:
        raise Lost(f"{where} does not answer") from e
    except OSError as e:
        raise Lost(f"cannot connect to {where}: {e.strerror}") from e
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return found


def _transport(socket_like: _ImpatientSocket) -> Transport:
    transport = Transport(cast(socket.socket, socket_like), _WINDOW_BYTES, _PACKET_BYTES)
    transport.daemon = True
    transport.set_log_channel(_LOG)
    transport.packetizer.REKEY_BYTES = _REKEY_BYTES
    options = transport.get_security_options()
    options.ciphers = [cipher for cipher in _CIPHERS if cipher in options.ciphers]
    options.digests = [digest for digest in _DIGESTS if digest in options.digests]
    return transport


def _prefer(transport: Transport, algorithms: Sequence[str]) -> None:
    """Ask for a host key of a kind that is known first, as OpenSSH does: servers have several."""
    options = transport.get_security_options()
    offered = list(options.key_types)
    first = [algorithm for algorithm in algorithms if algorithm in offered]
    options.key_types = [*first, *(algorithm for algorithm in offered if algorithm not in first)]


def _reason(address: SftpAddress, error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or "it closed the connection"
    return f"cannot connect to {address.host}: {said}"


def _close(transports: Sequence[Transport]) -> None:
    for transport in reversed(transports):
        with suppress(OSError, EOFError, SSHException):
            transport.close()
