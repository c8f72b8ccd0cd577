"""The numbers of the NBD protocol that a reading client needs.

Source: ``doc/proto.md`` of the NBD project (fixed newstyle negotiation, structured replies, metadata querying). All
fields are in network byte order.
"""

from __future__ import annotations

import struct
from typing import Final

from vmsnap.errors import SnapshotError

SERVER_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

OPTION_ABORT: Final = 2
OPTION_GO: Final = 7
OPTION_STRUCTURED_REPLY: Final = 8
OPTION_SET_META_CONTEXT: Final = 10

REPLY_ACK: Final = 1
REPLY_INFO: Final = 3
REPLY_META_CONTEXT: Final = 4
REPLY_ERROR_BIT: Final = 1 << 31
INFO_EXPORT: Final = 0
INFO_BLOCK_SIZE: Final = 3

TRANSMISSION_HAS_FLAGS: Final = 1 << 0
TRANSMISSION_READ_ONLY: Final = 1 << 1

TRANSMISSION_CAN_READ_WHOLE: Final = 1 << 7

COMMAND_READ: Final = 0
COMMAND_DISCONNECT: Final = 2
COMMAND_BLOCK_STATUS: Final = 7

COMMAND_FLAG_WHOLE: Final = 1 << 2
"""``NBD_CMD_FLAG_DF``: answer a read in one piece."""

CHUNK_DONE: Final = 1 << 0
CHUNK_NONE: Final = 0
CHUNK_DATA: Final = 1
CHUNK_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR_OFFSET: Final = CHUNK_ERROR_BIT | 2

STATE_HOLE: Final = 1 << 0
"""``base:allocation``: the range takes no room."""
STATE_ZERO: Final = 1 << 1
"""``base:allocation``: the range reads as zeros."""

GREETING: Final = struct.Struct(">QQH")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
EXTENT: Final = struct.Struct(">II")

LONGEST_STRING: Final = 4096
LONGEST_OPTION_REPLY: Final = 64 * 1024
LONGEST_STATUS: Final = 16 * 1024 * 1024
LONGEST_REQUEST_BYTES: Final = 32 * 1024 * 1024
"""What every server takes, if it does not say otherwise."""


class NbdError(SnapshotError):
    """An NBD server cannot be reached, refused, was too slow, or broke the protocol."""


class NbdRefused(NbdError):
    """The server answered a request with an error; the connection goes on.

    :ivar number: NBD's number of the error (those of Linux)
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
