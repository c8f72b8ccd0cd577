"""The head of an image that libvirt's `restore` takes: everything before QEMU's stream.

``struct _virQEMUSaveHeader``, ``src/qemu/qemu_saveimage.h`` of libvirt 9.0: a magic of 16 bytes, then little-endian
words of 32 bits (version 2, length of what follows the header, was running, compressed, begin of the cookie), zeros up
to 92 bytes; then the XML with its NUL, the cookie with its NUL.
"""

from __future__ import annotations

import struct
from typing import Final

_MAGIC: Final = b"LibvirtQemudSave"
_HEADER: Final = struct.Struct("<16s5I56x")
_VERSION: Final = 2


def head(xml: str, cpu: str) -> bytes:
    """The head for a domain that stays stopped. `cpu` is the ``<cpu>`` of the running domain, which libvirt keeps in
    the cookie, as that of the XML may leave open what the CPU really had; empty: no cookie.
    """
    data = xml.encode() + b"\0"
    cookie_at = 0
    if cpu:
        cookie_at = len(data)
        data += f"<cookie>{cpu}</cookie>".encode() + b"\0"
    return _HEADER.pack(_MAGIC, _VERSION, len(data), 0, 0, cookie_at) + data
