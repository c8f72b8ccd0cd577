"""The head of an image that libvirt's `save` and its snapshots make, and its `restore` takes: everything before QEMU's
stream.

``struct _virQEMUSaveHeader``, ``src/qemu/qemu_saveimage.h`` of libvirt 9.0: a magic of 16 bytes, then little-endian
words of 32 bits (version 2, length of what follows the header, was running, compressed, begin of the cookie), zeros up
to 92 bytes; then the XML with its NUL, the cookie with its NUL.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Final

from vmsnap.errors import HypervisorError

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


def stream_begin(file: BinaryIO) -> int:
    """Where QEMU's stream begins in an image that libvirt has written; the file is read from where it stands.

    :raises HypervisorError: it is no complete image, or it is compressed
    """
    raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise HypervisorError("libvirt wrote no complete image of the guest's memory")
    _, version, length_bytes, _, compressed, _ = _HEADER.unpack(raw)
    if version != _VERSION:
        raise HypervisorError(f"libvirt wrote an image of version {version}, of which nothing is known")
    if compressed:
        raise HypervisorError(
            "libvirt wrote a compressed image of the guest's memory",
            cure='set snapshot_image_format = "raw" in /etc/libvirt/qemu.conf',
        )
    return _HEADER.size + int(length_bytes)
