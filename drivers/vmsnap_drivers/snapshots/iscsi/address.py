"""Where a disk is that is a LUN: ``iscsi://portal/iqn/lun``."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmsnap.errors import SnapshotError

DEFAULT_PORT: Final = 3260
_ADDRESS: Final = re.compile(
    r"iscsi://(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9a-fA-F:]{2,45}\])(?::(?P<port>\d{1,5}))?"
    r"/(?P<target>[^/]+)/(?P<lun>\d{1,5})"
)
# RFC 7143, 4.2.7.4: a date, the reversed name of a domain, and what its owner likes.
_IQN: Final = re.compile(r"iqn\.\d{4}-\d{2}\.[a-z0-9]+(?:[.-][a-z0-9]+)*(?::[A-Za-z0-9.:-]+)?")
_LONGEST_IQN: Final = 223


@dataclass(frozen=True)
class LunAddress:
    """A LUN of a target behind a portal. `host` is as it was written, an IPv6 address in its brackets."""

    host: str
    port: int
    target: str
    lun: int

    @property
    def portal(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        """As QEMU's ``iscsi:`` URLs are."""
        return f"iscsi://{self.portal}/{self.target}/{self.lun}"

    def beside(self, target: str) -> LunAddress:
        """LUN 1 of another target behind the same portal."""
        return LunAddress(self.host, self.port, target, 1)


def parse(address: str) -> LunAddress | None:
    """The LUN at an address of a disk; None where it is something else. Never raises."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not is_iqn(found["target"]):
        return None
    port = int(found["port"] or DEFAULT_PORT)
    return LunAddress(found["host"], port, found["target"], int(found["lun"])) if 0 < port < 65536 else None


def is_iqn(name: str) -> bool:
    """Whether it is a name that a target may have."""
    return len(name) <= _LONGEST_IQN and _IQN.fullmatch(name) is not None


def name_beside(target: str, word: str) -> str:
    """The name of a target of ours: of the same authority as `target`, called `word`.

    :raises SnapshotError: no target can be called so
    """
    # Names of targets have no capitals and no underscores (RFC 3722).
    name = f"{target.partition(':')[0]}:{word.lower().replace('_', '-')}"
    if not is_iqn(name):
        raise SnapshotError(f"{name!r} is no name for an iSCSI target", cure="give the VM a shorter name")
    return name


def is_of_this_host(host: str) -> bool:
    """Whether it is an address of this host, not a name. Quick, asks nobody."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    if address.is_unspecified:
        return False
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((str(address), 0))
        except OSError:
            return False
    return True


def is_at(lun: LunAddress, portals: Iterable[str]) -> bool:
    """Whether a LUN's portal is one of those where a server listens (``10.0.0.5:3260``, ``[::]:3260``). Of a portal
    that has a name, only the port can be told. Asks nobody.
    """
    for portal in portals:
        host, _, port = portal.rpartition(":")
        if port != str(lun.port):
            continue
        try:
            there, asked = ipaddress.ip_address(host.strip("[]")), ipaddress.ip_address(lun.host.strip("[]"))
        except ValueError:
            return True
        if there.is_unspecified or there == asked:
            return True
    return False


def is_for_every_network(portal: str) -> bool:
    """Whether who listens at a portal is reached by all networks of its machine, such as at ``[::0]:3260``."""
    try:
        return ipaddress.ip_address(portal.rpartition(":")[0].strip("[]")).is_unspecified
    except ValueError:
        return False


def own_address_towards(lun: LunAddress) -> str:
    """The address of this host that the portal sees. Nothing is sent, but a name is looked up.

    :raises SnapshotError: there is no way there
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(lun.host.strip("[]"), lun.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.connect(where)
            return str(trial.getsockname()[0])
    except OSError as e:
        raise SnapshotError(f"there is no way to the portal {lun.portal}: {e.strerror}") from e
