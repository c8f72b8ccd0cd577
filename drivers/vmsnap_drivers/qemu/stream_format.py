"""The words of QEMU's migration stream, and what vmsnap keeps of one: :class:`CapturedMemory`.

All integers of the stream are big-endian. Sources: ``migration/savevm.c``, ``savevm.h`` and ``ram.c`` of QEMU 7.2 and
10.0, which agree in everything that a plain stream (no multifd, postcopy, xbzrle, compression) uses::

    header         "QEVM", version 3
    configuration  7, name of the machine type (32-bit length, bytes), subsections
    start          1, section id, name (8-bit length, bytes), instance, version, content, footer
    part, end      2 or 3, section id, content, footer
    full           4, like start: the state of one device, of a form that only the device knows
    command        8, 16-bit command, 16-bit length, content
    footer         0x7e, section id
    end of stream  0, then 6, 32-bit length, a description of all device states in JSON
"""

from __future__ import annotations

import base64
import binascii
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmsnap.errors import HypervisorError

MAGIC: Final = b"QEVM"
STREAM_VERSION: Final = 3

SECTION_EOF: Final = 0x00
SECTION_START: Final = 0x01
SECTION_PART: Final = 0x02
SECTION_END: Final = 0x03
SECTION_FULL: Final = 0x04
SUBSECTION: Final = 0x05
SECTION_VMDESCRIPTION: Final = 0x06
SECTION_CONFIGURATION: Final = 0x07
SECTION_COMMAND: Final = 0x08
SECTION_FOOTER: Final = 0x7E

# RAM_SAVE_FLAG_*: the low bits of the 64-bit word that begins each record of a ram section.
FLAG_ZERO: Final = 0x02
FLAG_MEM_SIZE: Final = 0x04
FLAG_PAGE: Final = 0x08
FLAG_EOS: Final = 0x10
FLAG_CONTINUE: Final = 0x20
REFUSED_FLAGS: Final[Mapping[int, str]] = {
    0x01: "the obsolete full flag",
    0x40: "xbzrle",
    0x80: "an RDMA hook",
    0x100: "compressed pages",
    0x200: "multifd",
}

RAM_SECTION_NAME: Final = "ram"
RAM_SECTION_VERSION: Final = 4

COMMAND_SWITCHOVER_START: Final = 11

WORD_BYTES: Final = 8
"""A record of a ram section begins with this much: page address and flags."""

ZERO_RECORD_BYTES: Final = WORD_BYTES + 1
"""A page of zeros is its word and one byte, the fill, always 0 (QEMU ≥ 2.0 sends no other)."""

DEFAULT_PAGE_BYTES: Final = 4096
"""Page size of the stream where it says nothing else: the target's own, 4 KiB on x86, ppc64, riscv and s390x."""


class StreamError(HypervisorError):
    """The migration stream is damaged, cut off, or has something in it that vmsnap does not take."""


@dataclass(frozen=True)
class RamBlock:
    """One block of guest RAM or ROM, as the stream names it.

    :ivar name: QEMU's name, for example ``pc.ram`` or ``0000:00:02.0/vga.vram``
    :ivar length_bytes: the used length: what the stream holds and what its image is long
    """

    name: str
    length_bytes: int


@dataclass(frozen=True)
class RamSection:
    """The identity of the stream's ram section, which a stream for loading has to repeat."""

    section_id: int
    instance_id: int
    version: int


@dataclass(frozen=True)
class CapturedMemory:
    """A machine's memory and device state, taken out of a migration stream.

    The pages are in one RAM image per block, in the same folder as ``device_state``
    (:func:`~vmsnap_drivers.qemu.ram_image.image_path`).

    :ivar blocks: all blocks in the order of the stream
    :ivar page_bytes: size of the stream's pages
    :ivar preamble: the first bytes of the stream, up to and including the configuration section
    :ivar ram_section: identity of the ram section
    :ivar device_state: file with everything that followed the last ram section, opaque, to the stream's end
    """

    blocks: tuple[RamBlock, ...]
    page_bytes: int
    preamble: bytes
    ram_section: RamSection
    device_state: Path

    @property
    def folder(self) -> Path:
        """The folder of the device state and the RAM images."""
        return self.device_state.parent

    @property
    def ram_bytes(self) -> int:
        """Length of all blocks together."""
        return sum(block.length_bytes for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Content for a manifest: strings, numbers, lists and dictionaries only; paths are left out."""
        section = self.ram_section
        return {
            "blocks": [{"name": block.name, "length_bytes": block.length_bytes} for block in self.blocks],
            "page_bytes": self.page_bytes,
            "preamble": base64.b64encode(self.preamble).decode("ascii"),
            "ram_section": {
                "section_id": section.section_id,
                "instance_id": section.instance_id,
                "version": section.version,
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, device_state: Path) -> CapturedMemory:
        """The reverse of :meth:`to_json`.

        :param device_state: where the device state is now; the RAM images are beside it
        :raises StreamError: when the content is not of that form
        """
        try:
            section = content["ram_section"]
            captured = cls(
                blocks=tuple(RamBlock(str(b["name"]), int(b["length_bytes"])) for b in content["blocks"]),
                page_bytes=int(content["page_bytes"]),
                preamble=base64.b64decode(content["preamble"], validate=True),
                ram_section=RamSection(
                    int(section["section_id"]), int(section["instance_id"]), int(section["version"])
                ),
                device_state=device_state,
            )
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise StreamError(f"the description of the captured memory is damaged: {error!r}") from error
        check_page_size(captured.page_bytes)
        check_blocks(captured.blocks, captured.page_bytes)
        return captured


def check_page_size(page_bytes: int) -> None:
    """See that a page size can be one.

    QEMU keeps ten bits of flags below the address, so pages have 1 KiB or more; 64 KiB is the largest of any target.

    :raises StreamError: when it is no power of two from 1 KiB to 64 KiB
    """
    if not 1024 <= page_bytes <= 65536 or page_bytes & (page_bytes - 1):
        raise StreamError(f"a page size of {page_bytes} bytes is not possible")


def check_blocks(blocks: tuple[RamBlock, ...], page_bytes: int) -> None:
    """See that a list of blocks can be one.

    :raises StreamError: when a name is empty, too long or there twice, or a length is not a number of whole pages
    """
    seen: set[str] = set()
    for block in blocks:
        if not 1 <= len(block.name.encode("utf-8")) <= 255:
            raise StreamError(f"a RAM block has a name that QEMU cannot have given: {block.name!r:.80}")
        if block.name in seen:
            raise StreamError(f"the RAM block {block.name!r} is listed twice")
        if block.length_bytes <= 0 or block.length_bytes % page_bytes:
            raise StreamError(f"the RAM block {block.name!r} has an impossible length, {block.length_bytes} bytes")
        seen.add(block.name)


def check_device_state_end(state: bytes | mmap.mmap, page_bytes: int) -> None:
    """See that a device state is complete: end-of-stream byte, then a description of exactly the length that it names.

    Without this a stream that was cut off within the device state would pass, because the devices' states have no
    lengths. QEMU writes the description unless the machine type is older than 2.3 (``suppress-vmdesc``).

    :param state: the whole device state
    :raises StreamError: when it is cut off, or was made with pages of another size
    """
    mark = bytes((SECTION_EOF, SECTION_VMDESCRIPTION))
    at = state.rfind(mark)
    # The two bytes may also be the upper half of the length itself, so go on looking.
    while at >= 0:
        text = at + len(mark) + 4
        if int.from_bytes(state[at + 2 : text], "big") == len(state) - text and state[text : text + 1] == b"{":
            break
        at = state.rfind(mark, 0, at + 1)
    if at < 0 or state[-1:] != b"}":
        raise StreamError(f"the stream ends within the device state, after {len(state)} bytes of it")
    said = re.search(rb'"page_size": *(\d{1,9})\b', state[text : text + 4096])
    if said and int(said[1]) != page_bytes:
        raise StreamError(f"the stream has pages of {int(said[1])} bytes, {page_bytes} were expected")
