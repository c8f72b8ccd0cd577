"""``qemu:///session``: a user who is not root backs up a domain of his own libvirtd, and brings it back beside it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab import find_qemu
from tests.lab import serial as console
from tests.lab.domain import LabDomain
from tests.lab.libvirt_session import SessionLibvirtd
from tests.lab.libvirtd import USER, userfaultfd_for_all
from tests.qemu_stage import until
from tests.test_cli import BIN

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]


@contextmanager
def session() -> Iterator[tuple[SessionLibvirtd, LabDomain]]:
    """The guest, as a domain of a user's own."""
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    place.chmod(0o755)
    try:
        with userfaultfd_for_all(), SessionLibvirtd(place / "se") as libvirtd:
            machine = LabDomain(place / "vm001", find_qemu("7.2"), libvirtd)
            machine.folder.mkdir()
            shutil.chown(machine.folder, USER, USER)
            machine.start()
            machine.wait_for_check(1)
            yield libvirtd, machine
    finally:
        shutil.rmtree(place)


def test_a_user_backs_up_his_own_domain_and_brings_it_back(tmp_path: Path) -> None:
    with session() as (libvirtd, machine):
        words = {"VMSNAP_REPOSITORY": str(libvirtd.folder / "backups"), "VMSNAP_PASSPHRASE": "of the user"}

        def vmsnap(*argv: str) -> Any:
            done = libvirtd.run(str(BIN / "vmsnap-libvirt"), *argv, "--json", **words)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        uri = ("-o", "uri=qemu:///session")
        vmsnap("init")
        (listed,) = vmsnap("list-vms", *uri)
        assert (listed["vm"], listed["live"], listed["captures"]) == ("vm001", True, ["cow", "libvirt"])
        vmsnap("vm", "add", "vm001", *uri)
        before = machine.latest_count()
        first = vmsnap("backup", "vm001")
        after = machine.latest_count()
        assert first["mode"] == "live" and 0 < first["pause_seconds"] <= 5
        assert vmsnap("backup", "vm001")["read_bytes"] < sum(disk.size_bytes for disk in machine.disks)
        vmsnap("restore", first["backup"], "--as", "vm002", "--run", "--isolated", *uri)
        log = libvirtd.folder / "state" / "vmsnap" / "libvirt" / "run" / "vm002" / "serial.log"
        until(lambda: len(console.checks(log.read_text())) >= 2, "it counts on and checks itself")
        text = log.read_text()
        assert console.faults(text) == [] and before <= console.counts(text)[0] <= after + 200
        assert {path.owner() for path in log.parent.iterdir()} == {USER}
        assert machine.domain.connect().lookupByName("vm002").isActive()
        machine.domain.connect().lookupByName("vm002").destroy()
        machine.wait_for_check(machine.latest_check() + 1)
        assert machine.faults() == []
        captures = libvirtd.folder / "state" / "vmsnap" / "libvirt" / "captures"
        assert list(captures.iterdir()) == [] and vmsnap("recover")["kept"] == []
