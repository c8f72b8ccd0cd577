"""Where targets are served: this host, or storage appliances that are reached over SSH, chosen by the portal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmsnap.errors import SnapshotError, UsageError
from vmsnap_drivers.runner import LocalRunner, Runner
from vmsnap_drivers.runner_ssh import SshRunner, SshSettings
from vmsnap_drivers.snapshots.iscsi.address import DEFAULT_PORT, LunAddress, is_of_this_host
from vmsnap_drivers.snapshots.iscsi.files import Files
from vmsnap_drivers.snapshots.iscsi.stores import Origin, Stores
from vmsnap_drivers.snapshots.iscsi.tgt import Tgt
from vmsnap_drivers.snapshots.iscsi.volumes import Volumes

HERE: Final = "this host"
_SOCKETS: Final = Path("/var/run/tgtd")
_BLOCK_DEVICE: Final = "block special file"


@dataclass
class Place:
    """One place where a tgtd serves targets. `name` is what messages call it, `portal` where it is reached; empty for
    this host.
    """

    name: str
    portal: str
    runner: Runner
    control_port: int
    tgt: Tgt = field(init=False)
    kinds: Mapping[str, Stores] = field(init=False)

    def __post_init__(self) -> None:
        self.tgt = Tgt(self.runner, self.control_port)
        self.kinds = {stores.kind: stores for stores in (Files(self.runner), Volumes(self.runner))}

    @property
    def here(self) -> bool:
        """It is this host."""
        return self.name == HERE

    def look(self, path: str) -> Origin:
        """What lies at the path of a backing store.

        :raises SnapshotError: it is not there, or cannot be snapshotted
        """
        done = self.runner.run(["stat", "--dereference", "--format=%F", "--", path], 60.0)
        if done.status:
            raise SnapshotError(f"the backing store {path} on {self.name} cannot be looked at")
        kind = Volumes.kind if done.stdout.strip() == _BLOCK_DEVICE else Files.kind
        return self.kinds[kind].look(path)


class Places:
    """All of them that are configured, made when they are asked for."""

    def __init__(self, appliances: str, control_port: int, ssh: SshSettings) -> None:
        """Remember what is configured; no I/O.

        :raises UsageError: it is none
        """
        self._control_port = control_port
        self._settings = ssh
        self._urls = dict(_entry(word) for word in appliances.replace(",", " ").split())
        self._made: dict[str, Place] = {}

    def serves(self, lun: LunAddress) -> bool:
        """Whether its portal is one of an appliance that is configured, or of a tgtd on this host. Quick."""
        if lun.portal in self._urls:
            return True
        return self.has_tgtd() and is_of_this_host(lun.host)

    def has_tgtd(self) -> bool:
        """Whether a tgtd of this host can be asked by us."""
        return os.access(_SOCKETS / f"socket.{self._control_port}", os.W_OK)

    def of(self, portal: str) -> Place:
        """The place behind a portal."""
        url = self._urls.get(portal, "")
        if url not in self._made:
            if url:
                runner: Runner = SshRunner(url, self._settings)
                self._made[url] = Place(f"the appliance {url}", portal, runner, 0)
            else:
                self._made[url] = Place(HERE, "", LocalRunner(), self._control_port)
        return self._made[url]

    def all(self) -> Iterator[Place]:
        """This host where it has a tgtd, and all appliances."""
        if self.has_tgtd():
            yield self.of("")
        for portal in self._urls:
            yield self.of(portal)

    def close(self) -> None:
        """Let go of connections; idempotent."""
        for place in self._made.values():
            place.runner.close()
        self._made.clear()


def _entry(word: str) -> tuple[str, str]:
    portal, equals, url = word.partition("=")
    if not equals or not portal or not url.startswith("ssh://"):
        raise UsageError(
            f"appliances: {word!r} names no appliance", cure="write it as PORTAL=ssh://USER@HOST, several with spaces"
        )
    has_port = portal.rpartition(":")[2].isdecimal() and not portal.endswith("]")
    return (portal if has_port else f"{portal}:{DEFAULT_PORT}"), url
