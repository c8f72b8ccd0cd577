"""What is kept of a domain so that it can be made to exist again: plain data, without secrets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from vmsnap.model import Json
from vmsnap_drivers.qemu.stored_definition import read_definition

FORMAT: Final = 1
NVRAM: Final = "pflash1"
"""The device name of the disk that holds the firmware's variables."""


@dataclass(frozen=True)
class DefinedDisk:
    """A disk of the domain: `device` is its target in the XML (``vda``), or `NVRAM`."""

    device: str
    address: str
    format: str
    read_only: bool


@dataclass(frozen=True)
class Definition:
    """A domain.

    :ivar xml: the running domain, as libvirt would give it to another host (``VIR_DOMAIN_XML_MIGRATABLE``)
    :ivar cpu: its ``<cpu>`` as it really is, which libvirt keeps beside that in images of its own
    :ivar inactive_xml: what it is when it is started again; empty where it is transient
    """

    format: int
    xml: str
    cpu: str
    inactive_xml: str
    version: tuple[int, int, int]
    disks: tuple[DefinedDisk, ...]

    def to_json(self) -> Json:
        """Plain JSON for `VmDescription.definition`."""
        plain: Json = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, content: Json) -> Definition:
        """The reverse of `to_json`.

        :raises HypervisorError: it is none of ours
        """
        return read_definition(content, cls, FORMAT)
