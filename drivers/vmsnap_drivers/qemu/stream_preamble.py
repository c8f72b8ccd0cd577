"""The beginning of a migration stream: header and configuration section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmsnap_drivers.qemu.stream_buffer import StreamBuffer
from vmsnap_drivers.qemu.stream_format import (
    DEFAULT_PAGE_BYTES,
    MAGIC,
    SECTION_CONFIGURATION,
    STREAM_VERSION,
    SUBSECTION,
    StreamError,
)

MAX_MACHINE_NAME_BYTES: Final = 256
MAX_CAPABILITIES: Final = 64


@dataclass(frozen=True)
class Preamble:
    """What comes before the first section of a device.

    :ivar content: the bytes themselves, which a stream for loading repeats
    :ivar page_bytes: size of the stream's pages
    """

    content: bytes
    page_bytes: int


def read_preamble(source: StreamBuffer) -> Preamble:
    """Read header and configuration section (``vmstate_configuration``, ``migration/savevm.c``, QEMU 7.2 and 10.0).

    :raises StreamError: when this is no migration stream, is cut off, or has a form that a capability changed
    """
    reader = _PreambleReader(source)
    reader.read()
    return Preamble(bytes(reader.content), reader.page_bytes)


class _PreambleReader:
    """Keeps what it reads."""

    def __init__(self, source: StreamBuffer) -> None:
        self._source = source
        self.content = bytearray()
        self.page_bytes = DEFAULT_PAGE_BYTES

    def read(self) -> None:
        if self._keep(4) != MAGIC:
            raise StreamError("this is no migration stream: it does not begin with QEVM")
        version = self._keep_number(4)
        if version != STREAM_VERSION:
            raise StreamError(f"the migration stream has version {version}; only {STREAM_VERSION} is known")
        if self._source.peek() != SECTION_CONFIGURATION:
            return
        self._keep(1)
        name_bytes = self._keep_number(4)
        if not 1 <= name_bytes <= MAX_MACHINE_NAME_BYTES:
            raise StreamError(f"the name of the machine type cannot be {name_bytes} bytes long")
        self._keep(name_bytes)
        while self._source.peek() == SUBSECTION:
            self._read_subsection()

    def _read_subsection(self) -> None:
        self._keep(1)
        name = self._keep(self._keep_number(1))
        self._keep(4)
        if name == b"configuration/target-page-bits":
            bits = self._keep_number(4)
            if not 10 <= bits <= 16:
                raise StreamError(f"a page size of 2^{bits} bytes is not possible")
            self.page_bytes = 1 << bits
        elif name == b"configuration/uuid":
            self._keep(16)
        elif name == b"configuration/capabilities":
            # Only capabilities that change the stream are named here (should_validate_capability, migration/savevm.c).
            count = self._keep_number(4)
            if count > MAX_CAPABILITIES:
                raise StreamError(f"the stream cannot have {count} capabilities")
            names = [self._keep(self._keep_number(1)).decode("utf-8", "replace") for _ in range(count)]
            if names:
                raise StreamError(f"the stream was made with {', '.join(names)!r}: turn that migration capability off")
        else:
            raise StreamError(f"the stream's configuration has the unknown part {name.decode('utf-8', 'replace')!r}")

    def _keep(self, count: int) -> bytes:
        taken = self._source.take(count)
        self.content += taken
        return taken

    def _keep_number(self, count: int) -> int:
        return int.from_bytes(self._keep(count), "big")
