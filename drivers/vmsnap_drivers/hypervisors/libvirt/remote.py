"""What of a libvirt can be had by its URI (libvirt's ``docs/uri.rst``): descriptors pass over UNIX sockets alone."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from vmsnap.errors import CannotCapture

_LOCAL_TRANSPORTS: Final = ("", "unix")


def is_remote(uri: str) -> bool:
    """Whether it goes over the network, be it to this very host."""
    found = urlsplit(uri)
    transport = found.scheme.partition("+")[2]
    return transport not in _LOCAL_TRANSPORTS or (not transport and bool(found.hostname))


def check_passes_descriptors(vm: str, uri: str) -> None:
    """See that QEMU can be handed the end of a stream, and that its files are those of this host: libvirt's own
    snapshot writes the memory there, and the mechanism ``qcow2`` hands QEMU a socket to read disks by.

    :raises CannotCapture: it cannot
    """
    if is_remote(uri):
        raise CannotCapture(
            f"VM {vm!r} is reached over the network ({urlsplit(uri).scheme}://…), over which QEMU cannot be handed the"
            " stream of its memory, and its disks lie there",
            cure="run vmsnap on the VM's host with -o uri=qemu:///system",
        )
