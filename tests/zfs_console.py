"""What the commands of ``vmsnap-zfs`` report, and with which status they end, on whatever ZFS there is."""

from __future__ import annotations

import os
from pathlib import Path

from tests.consoles import Console
from tests.disk_rig import sync, write
from tests.zfs_rig import MIB, Run, make_image, names
from vmsnap.cli.backends import vmsnap_zfs


def see_the_commands(run: Run, pool: str, folder: Path, state: Path) -> None:
    """All of them, with an image file in `folder`, which is where the file system ``POOL/vm`` is mounted."""
    image = make_image(folder / "console.img", MIB, "disk0")
    write(image.address, 0, content := os.urandom(MIB))
    sync(image.address)
    before = names(run, pool)
    console = Console(vmsnap_zfs, state, {"pause_seconds": "60"})
    assert {found["severity"] for found in console("doctor")} == {"ok"}
    assert "does not serve /dev/null" in console("snapshot", "/dev/null", status=2)
    assert f"there is no {folder}/nothing" in console("snapshot", f"{folder}/nothing", status=3)
    taken = console("snapshot", image.address)
    name = taken["snapshot"]
    assert taken["disks"] == [{"device": "disk0", "address": image.address, "size_bytes": MIB}] and taken["complete"]
    write(image.address, 0, bytes(MIB))
    (made,) = console("clone", name, "--as", "trial")["disks"]
    assert made["device"] == "disk0" and Path(made["address"]).read_bytes() == content
    listed = console("list")
    assert [(each["snapshot"], each["clones"]) for each in listed["snapshots"]] == [(name, [{"name": "trial", **made}])]
    assert {each["kind"] for each in listed["resources"]} == {"snapshot", "reader", "clone"}
    assert "has clones: trial" in console("delete", name, status=1)
    with Path(made["address"]).open("rb"):
        assert "busy" in console("delete", name, "--clone", "trial", status=5)
    console("delete", name, "--clone", "trial")
    run("zfs", "hold", "theirs", f"{pool}/vm@{name}")
    assert f"{pool}/vm@{name} is held or cloned by somebody else" in console("delete", name, status=5)
    run("zfs", "release", "theirs", f"{pool}/vm@{name}")
    console("delete", name)
    assert console("list") == {"snapshots": [], "resources": []}
    assert "there is no snapshot" in console("delete", name, status=3)
    assert names(run, pool) == before
    Path(image.address).unlink()
