"""Which of QEMU's block drivers reach bytes and which read a format out of them.

A raw disk may have a node ``raw`` above the one of its file, or none: then the guest's device stands on the protocol
itself, as under newer libvirts (``pflash1=libvirt-pflash1-storage`` in their command lines, where 9.0 has
``libvirt-pflash1-format``).

Source: ``BlockdevDriver`` in ``qapi/block-core.json`` of QEMU, 7.2 and 10.0; a protocol is a driver that has a
``protocol_name`` in ``block/*.c``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

_PROTOCOLS_WORDS: Final = """
    file host_device host_cdrom iscsi nbd nfs rbd ssh gluster http https ftp ftps
"""
PROTOCOLS: Final = frozenset(_PROTOCOLS_WORDS.split())
"""Drivers whose bytes are the disk's. Not ``null-co``, ``null-aio`` and ``vvfat``, which make content up."""

_PAST_PROTECTION: Final = frozenset(
    ["nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"]
)
"""Drivers that have a device or another process move data into the guest's RAM, past the host's page protection
(``block/nvme.c``: by VFIO; ``block/blkio.c``: by libblkio, which maps the RAM).
"""


def moves_past_protection(node: Mapping[str, Any]) -> bool:
    """Whether what is read from a node can reach the guest's RAM without that the host's page protection sees it. Then
    a memory that is captured while the guest runs would have what came later.
    """
    return str(node["drv"]) in _PAST_PROTECTION


def is_part(node: Mapping[str, Any]) -> bool:
    """Whether a raw node is not all of what it lies on: QEMU has no name for it then but its options (``raw_format`` in
    ``block/raw-format.c``: ``offset`` and ``size`` are strong ones).
    """
    name = str(node["file"])
    if node["drv"] != "raw" or not name.startswith("json:"):
        return False
    try:
        options = json.loads(name.removeprefix("json:"))
    except ValueError:
        return False  # cut off, as QEMU's names are at 4096 bytes
    return bool({"offset", "size"} & options.keys())


def format_of(node: Mapping[str, Any]) -> str:
    """The format of a disk, by what QEMU says of its node (``drv`` of ``BlockDeviceInfo``): ``raw``, ``qcow2``, …; of a
    filter or another node that is no disk's, its driver.
    """
    driver = str(node["drv"])
    return "raw" if driver in PROTOCOLS else driver
