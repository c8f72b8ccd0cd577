"""The address under which a VM's monitor is borrowed by way of libvirt: ``libvirt:URI#UUID``."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from vmsnap.errors import UsageError

SCHEME: Final = "libvirt:"


@dataclass(frozen=True)
class LibvirtAddress:
    """A domain: of which libvirt, and its UUID, which no other domain of it has."""

    uri: str
    uuid: str

    def text(self) -> str:
        """What `parse` takes."""
        return f"{SCHEME}{self.uri}#{self.uuid}"

    @classmethod
    def parse(cls, text: str) -> LibvirtAddress:
        """The reverse of `text`.

        :raises UsageError: it is no such address
        """
        uri, _, identity = text.removeprefix(SCHEME).rpartition("#")
        try:
            if not text.startswith(SCHEME) or not uri:
                raise ValueError(text)
            return cls(uri, str(uuid.UUID(identity)))
        except ValueError as e:
            raise UsageError(f"{text!r} is no address of a libvirt domain") from e


def is_libvirt_address(text: str) -> bool:
    """Whether a monitor's address goes by way of libvirt."""
    return text.startswith(SCHEME)
