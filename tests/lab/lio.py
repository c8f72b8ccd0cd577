"""A real LIO, the iSCSI target in Linux, in a guest whose kernel has it, told by rtslib as its users do. Needs root.

Also a program, for a guest that is reached by its console alone::

    /usr/bin/python3 tests/lab/lio.py RTSLIB PORTAL add|show [TARGET PATH INITIATOR…]

It imports nothing but rtslib, since it runs with the guest's own Python. A CHAP secret comes on standard input.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

QEMU = "iqn.2008-11.org.linux-kvm"
# The kernel would load all but the first three itself, but for the root file system from which it looks for them.
_MODULES = (
    "configfs", "target_core_mod", "iscsi_target_mod", "target_core_file", "target_core_iblock", "crc32c_generic"
)  # fmt: skip
_CONFIGFS = Path("/sys/kernel/config")
_STATE = Path("/etc/rtslib-fb-target")
"""Where Debian's rtslib has LIO keep what outlives it, such as reservations."""


class LioServer:
    """The kernel's one LIO, for a ``with``; targets made here listen at `portal` and admit QEMU's programs."""

    def __init__(self, library: Path, portal: str = "127.0.0.1:3260") -> None:
        self.portal = portal
        self.this_host = QEMU
        self._library = library

    @property
    def options(self) -> dict[str, str]:
        """Of the mechanism ``iscsi``, for this server."""
        return {"server": "lio"}

    def address(self, target: str) -> str:
        """The address of a target's first disk."""
        return f"iscsi://{self.portal}/{target}/1"

    def start(self) -> None:
        """Load it."""
        for module in _MODULES:
            subprocess.run(["modprobe", module], check=True)
        if not (_CONFIGFS / "target").is_dir():
            subprocess.run(["mount", "-t", "configfs", "configfs", str(_CONFIGFS)], check=True)
        for folder in ("pr", "alua"):
            (_STATE / folder).mkdir(parents=True, exist_ok=True)
        self._iscsi()

    def kill(self) -> None:
        """Forget all targets and backing stores, as a machine does that starts anew."""
        self._rtslib().RTSRoot().clear_existing(confirm=True)

    def __enter__(self) -> "LioServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def add(
        self,
        target: str,
        path: Path | None,
        *,
        user: str = "",
        password: str = "",
        shown: tuple[str, str] = ("", ""),
        initiators: tuple[str, ...] = (QEMU,),
    ) -> None:
        """Make a target whose disk is that file or device (None: a target without one), for these initiators.

        :param shown: the account by which the target shows who it is, and its secret
        """
        rtslib = self._rtslib()
        group = rtslib.TPG(rtslib.Target(self._iscsi(), target), 1)
        if path is not None:
            host, _, port = self.portal.rpartition(":")
            rtslib.NetworkPortal(group, host, int(port))
            name = target.rpartition(":")[2]
            if path.is_block_device():
                store = rtslib.BlockStorageObject(name, dev=str(path))
            else:
                store = rtslib.FileIOStorageObject(name, dev=str(path), size=path.stat().st_size)
            lun = rtslib.LUN(group, 1, store)
            for initiator in initiators:
                access = rtslib.NodeACL(group, initiator)
                rtslib.MappedLUN(access, 1, lun)
                if user:
                    access.chap_userid, access.chap_password = user, password
                if shown[0]:
                    access.chap_mutual_userid, access.chap_mutual_password = shown
            group.enable = True
        group.set_attribute("authentication", int(bool(user)))

    def add_disk(self, target: str, path: Path, number: int, seen: Mapping[str, int]) -> None:
        """Give a target one more LUN, which each of these initiators sees by a number of its own."""
        rtslib = self._rtslib()
        (group,) = self._find(target).tpgs
        name = f"{target.rpartition(':')[2]}-{number}"
        store = rtslib.FileIOStorageObject(name, dev=str(path), size=path.stat().st_size)
        lun = rtslib.LUN(group, number, store)
        for initiator, as_number in seen.items():
            rtslib.MappedLUN(rtslib.NodeACL(group, initiator), as_number, lun)

    def remove(self, target: str) -> None:
        """Remove a target, whoever uses it, with its backing stores."""
        found = self._find(target)
        stores = [lun.storage_object for group in found.tpgs for lun in group.luns]
        found.delete()
        for store in stores:
            store.delete()

    def targets(self) -> dict[str, list[str]]:
        """All targets, each with its backing stores."""
        return {
            target.wwn: [lun.storage_object.udev_path for group in target.tpgs for lun in group.luns]
            for target in self._iscsi().targets
        }

    def stores(self) -> list[str]:
        """All that backing stores hold open."""
        return sorted(store.udev_path for store in self._rtslib().RTSRoot().storage_objects)

    def access(self, target: str) -> list[str]:
        """Whom a target admits."""
        return sorted(access.node_wwn for group in self._find(target).tpgs for access in group.node_acls)

    def sessions(self, target: str) -> list[str]:
        """Who uses it."""
        admitted = [access for group in self._find(target).tpgs for access in group.node_acls]
        return sorted(access.node_wwn for access in admitted if access.session)

    def portals(self, target: str) -> list[str]:
        """Where a target listens."""
        found = [portal for group in self._find(target).tpgs for portal in group.network_portals]
        return sorted(f"{portal.ip_address}:{portal.port}" for portal in found)

    def read_only(self, target: str) -> bool:
        """Whether whoever is admitted may only read."""
        mapped = [lun for group in self._find(target).tpgs for access in group.node_acls for lun in access.mapped_luns]
        return bool(mapped) and all(lun.write_protect for lun in mapped)

    def _find(self, name: str) -> Any:
        (found,) = (target for target in self._iscsi().targets if target.wwn == name)
        return found

    def _iscsi(self) -> Any:
        return self._rtslib().FabricModule("iscsi")

    def _rtslib(self) -> Any:
        if str(self._library) not in sys.path:
            sys.path.append(str(self._library))
        library = importlib.import_module("rtslib_fb")
        # It remembers which backing stores there are; others make and remove some too.
        importlib.import_module("rtslib_fb.tcm").bs_cache.clear()
        return library


if __name__ == "__main__":
    server = LioServer(Path(sys.argv[1]), sys.argv[2])
    if sys.argv[3] == "start":
        server.start()
    elif sys.argv[3] == "add":
        user, _, password = sys.stdin.readline().strip().partition(" ")
        server.add(sys.argv[4], Path(sys.argv[5]), user=user, password=password, initiators=tuple(sys.argv[6:]))
    json.dump({"targets": server.targets(), "stores": server.stores()}, sys.stdout)
