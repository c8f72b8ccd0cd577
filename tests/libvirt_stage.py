"""What the tests of the libvirt driver share: a libvirtd of their own, the lab's guest as its domain, a controller."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.guardians import remove_host
from tests.lab import Disk, ext4, find_qemu
from tests.lab.bridge import Bridge
from tests.lab.certificates import Authority
from tests.lab.domain import CHAP, LabDomain
from tests.lab.libvirtd import Libvirtd, userfaultfd_for_all
from tests.lab.machine import DEFAULT_DISKS, MIB
from vmsnap.controller import Controller, Drivers
from vmsnap.controller.results import RestoreResult
from vmsnap.host import HostFolders
from vmsnap.places import create_repository
from vmsnap.repository import Repository
from vmsnap.roles import Hypervisor

EXT4_BYTES = 64 * MIB
_numbers = itertools.count(100)
_LISTS = (
    ("list", "--all", "--name"),
    ("domblklist", "vm001"),
    ("domiflist", "vm001"),
    ("snapshot-list", "vm001", "--name"),
    ("checkpoint-list", "vm001", "--name"),
    ("domjobinfo", "vm001"),
    ("domstate", "vm001", "--reason"),
    ("net-list", "--all"),
    ("pool-list", "--all"),
    ("nwfilter-binding-list",),
)


@dataclass
class Stage:
    place: Path
    libvirtd: Libvirtd
    bridge: Bridge
    machine: LabDomain
    controller: Controller
    repository: Repository

    @property
    def options(self) -> Mapping[str, str]:
        """Where libvirt is."""
        return {"uri": self.libvirtd.uri}

    def seen_by_virsh(self) -> dict[str, str]:
        """What people see of the domain, and of all."""
        return {" ".join(words): self.libvirtd.virsh(*words) for words in _LISTS}

    def see_nothing_of_ours(self, *disks: str) -> None:
        """virsh shows one domain, on its own disks where no others are given, and nothing of ours in any of its lists:
        not even what was there before all tests, with which `at_rest` is compared.
        """
        seen = self.seen_by_virsh()
        own = {str(self.machine.disk_path(index)) for index in range(len(self.machine.disks))}
        assert seen["list --all --name"].split() == ["vm001"]
        assert {line.split()[1] for line in seen["domblklist vm001"].splitlines() if line.strip()} == set(disks or own)
        assert seen["snapshot-list vm001 --name"].split() == seen["checkpoint-list vm001 --name"].split() == []
        assert seen["domjobinfo vm001"].split() == ["Job", "type:", "None"]

    def at_rest(self) -> tuple[Any, ...]:
        """All that a backup, a restore or a duplicate could leave on this host."""
        state, ask = self.controller.folders.state_dir, self.machine.oracle.execute
        folders: tuple[Path, ...] = (self.controller.folders.memory_dir, state / "duplicates", state / "vms")
        folders = (
            *folders,
            state / "libvirt" / "run",
            state / "libvirt" / "captures",
            self.place / "lv" / "lib" / "qemu" / "save",
        )
        left = {str(path) for folder in folders for path in folder.rglob("*")}
        nodes = {(node["node-name"], node["drv"], node["file"], node["ro"]) for node in ask("query-named-block-nodes")}
        tops = sorted((entry["qdev"], entry["inserted"]["node-name"]) for entry in ask("query-block"))
        settings = ask("query-migrate-parameters"), ask("query-migrate-capabilities")
        files = {path.name for path in self.machine.folder.iterdir()}
        processes = self.libvirtd.qemus()
        jobs = ask("query-block-jobs"), ask("query-block-exports")
        return self.seen_by_virsh(), left, nodes, tops, settings, files, processes, jobs

    @contextmanager
    def restored(self, backup: str, *, run: bool = True, **options: str) -> Iterator[tuple[RestoreResult, Hypervisor]]:
        """The backup as ``vm002``, isolated, and its driver, for a ``with``; nothing of it is there afterwards."""
        result = self.controller.restore(
            self.repository, backup, "vm002", run=run, isolated=True, options={**self.options, **options}
        )
        driver = self.controller.drivers.hypervisor("libvirt", "vm002", result.options)
        try:
            yield result, driver
        finally:
            driver.destroy()
            driver.close()
            self.controller.remove_vm("vm002")
            shutil.rmtree(self.place / "state" / "vms")

    def serial_log(self, vm: str) -> Path:
        """What a loaded VM says."""
        return self.controller.folders.state_dir / "libvirt" / "run" / vm / "serial.log"


@contextmanager
def staged(
    *,
    usb_bus: bool = False,
    authority: Authority | None = None,
    qemu: str = "7.2",
    chap_word: str = "",
    memory_mib: int = 256,
    own_mib: int = 0,
    options: Mapping[str, str] | None = None,
    disks: Sequence[Disk] = DEFAULT_DISKS,
    mechanism_options: Mapping[str, Mapping[str, str]] | None = None,
    more_devices: str = "",
    more_os: str = "",
    **settings: int,
) -> Iterator[Stage]:
    """The guest, registered as ``vm001``, under load, its card on a bridge, in the QEMU of that version. Its kernel
    uses only `own_mib` of its memory, where that is given. Its libvirtd listens for TLS, where it has an `authority`,
    and keeps the `chap_word` of LUNs. With the setting ``ext4_disk=2`` its second disk, 64 MiB, has that file system.
    """
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    # QEMU's user has to get to the disks.
    place.chmod(0o755)
    folders = HostFolders.find(place / "state")
    with (
        userfaultfd_for_all(),
        Libvirtd(place / "lv", usb_bus=usb_bus, authority=authority, any_qemu=qemu != "7.2") as libvirtd,
        Controller(folders, drivers=Drivers(folders.context(), mechanism_options)) as controller,
        Bridge(next(_numbers)) as bridge,
    ):
        machine = LabDomain(
            place / "vm001",
            find_qemu(qemu),
            libvirtd,
            settings={"packets": 1, **settings},
            interface=f"<interface type='bridge'><source bridge='{bridge.name}'/>{{}}</interface>",
            memory_mib=memory_mib,
            own_mib=own_mib,
            disks=(Disk("qcow2"), Disk("raw", EXT4_BYTES)) if settings.get("ext4_disk") else disks,
            more_devices=more_devices,
            more_os=more_os.format(folder=place / "vm001"),
        )
        if settings.get("ext4_disk"):
            machine.folder.mkdir()
            ext4.make_ext4(machine.disk_path(1), EXT4_BYTES)
        if chap_word:
            libvirtd.keep_secret(CHAP, chap_word)
        machine.start()
        controller.add_vm("vm001", "libvirt", {"uri": libvirtd.uri, **(options or {})})
        machine.wait_for_check(1)
        yield Stage(place, libvirtd, bridge, machine, controller, create_repository(str(place / "repository")))
    remove_host(place)
