"""The negotiation that opens an NBD connection: fixed newstyle, structured replies, metadata contexts, GO."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vmsnap_drivers.qemu import nbd_wire as wire
from vmsnap_drivers.qemu.nbd_socket import NbdSocket
from vmsnap_drivers.qemu.nbd_wire import NbdError


@dataclass(frozen=True)
class Export:
    """What the server said of an export: its size, its transmission flags, the numbers of the metadata contexts that
    it grants, and the longest request that it takes.
    """

    size_bytes: int
    flags: int
    contexts: Mapping[str, int]
    longest_request_bytes: int


def negotiate(connection: NbdSocket, name: str, contexts: Sequence[str]) -> Export:
    """Open the export `name` for reading, and ask for the metadata `contexts`; the server may grant fewer. Blocks.

    Block sizes are not asked for: a server must then take any offset and length.

    :raises NbdError: no such export, a server that cannot do structured replies, or one that breaks the protocol; the
        connection is closed
    """
    encoded = name.encode()
    if len(encoded) > wire.LONGEST_STRING:
        raise NbdError(f"an NBD export's name has {wire.LONGEST_STRING} bytes at most")
    _greet(connection)
    for reply, _ in _ask(connection, wire.OPTION_STRUCTURED_REPLY, b""):
        raise connection.broken(f"it answered the wish for structured replies with {reply}")
    granted = _ask_contexts(connection, encoded, contexts) if contexts else {}
    return _go(connection, encoded, granted)


def take_leave(connection: NbdSocket) -> None:
    """Greet a server and say goodbye, so that it is known to answer and keeps nothing of this connection; `connection`
    is closed on return. Blocks.

    :raises NbdError: it does not answer, or breaks the protocol
    """
    _greet(connection)
    for reply, _ in _ask(connection, wire.OPTION_ABORT, b""):
        raise connection.broken(f"it answered a goodbye with {reply}")
    connection.await_end()


def _greet(connection: NbdSocket) -> None:
    magic, option_magic, flags = wire.GREETING.unpack(connection.receive(wire.GREETING.size))
    if magic != wire.SERVER_MAGIC or option_magic != wire.OPTION_MAGIC:
        raise connection.broken("it does not greet as an NBD server of the newstyle does")
    if not flags & wire.FLAG_FIXED_NEWSTYLE:
        raise connection.broken("it does not offer the fixed newstyle negotiation")
    connection.send(struct.pack(">I", flags & (wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)))


def _ask_contexts(connection: NbdSocket, name: bytes, contexts: Sequence[str]) -> dict[str, int]:
    queries = [context.encode() for context in contexts]
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    data += b"".join(struct.pack(">I", len(query)) + query for query in queries)
    granted: dict[str, int] = {}
    for reply, answer in _ask(connection, wire.OPTION_SET_META_CONTEXT, data):
        if reply != wire.REPLY_META_CONTEXT or len(answer) < 4:
            raise connection.broken(f"it answered the wish for metadata with {reply}")
        granted[answer[4:].decode(errors="replace")] = int.from_bytes(answer[:4], "big")
    return {context: number for context, number in granted.items() if context in contexts}


def _go(connection: NbdSocket, name: bytes, contexts: Mapping[str, int]) -> Export:
    size: int | None = None
    flags = 0
    longest = wire.LONGEST_REQUEST_BYTES
    for reply, answer in _ask(connection, wire.OPTION_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0)):
        if reply != wire.REPLY_INFO or len(answer) < 2:
            raise connection.broken(f"it answered the choice of the export with {reply}")
        kind = int.from_bytes(answer[:2], "big")
        if kind == wire.INFO_EXPORT:
            if len(answer) != 12:
                raise connection.broken("it described the export in another form than the protocol's")
            size, flags = struct.unpack(">QH", answer[2:])
        elif kind == wire.INFO_BLOCK_SIZE and len(answer) == 14:
            longest = min(longest, struct.unpack(">III", answer[2:])[2])
    if size is None:
        raise connection.broken("it did not say how large the export is")
    if not flags & wire.TRANSMISSION_HAS_FLAGS or size >= 1 << 63 or longest < 1:
        raise connection.broken("what it says of the export is not possible")
    return Export(size, flags, contexts, longest)


def _ask(connection: NbdSocket, option: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Ask for an option and yield the answers before the final acknowledgement."""
    connection.send(wire.OPTION.pack(wire.OPTION_MAGIC, option, len(data)) + data)
    while True:
        magic, about, reply, length = wire.OPTION_REPLY.unpack(connection.receive(wire.OPTION_REPLY.size))
        if magic != wire.OPTION_REPLY_MAGIC or about != option:
            raise connection.broken("it answered an option that was not asked")
        if length > wire.LONGEST_OPTION_REPLY:
            raise connection.broken(f"its answer to an option is {length} bytes long")
        answer = connection.receive(length)
        if reply & wire.REPLY_ERROR_BIT:
            reason = answer.decode(errors="replace") or f"error {reply & ~wire.REPLY_ERROR_BIT}"
            raise connection.broken(f"it refused option {option}: {reason}")
        if reply == wire.REPLY_ACK:
            return
        yield reply, answer
