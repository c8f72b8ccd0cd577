"""A real pool of OpenZFS in the storage guest, on a file in RAM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from vmsnap.model import Disk
from vmsnap_drivers.snapshots.zfs.lookup import node_of

MIB = 1 << 20
NODES = Path("/dev/zvol")
_ZVOL_ID = "/usr/lib/udev/zvol_id"
_SEEN_BY_THE_KERNEL = Path("/root/tmp")
_MODULES = ("spl", "znvpair", "zcommon", "icp", "zavl", "zunicode", "zlua", "zzstd", "zfs")
"""In the order in which they need each other: they have no place in ``modules.dep``."""


def run(*argv: str) -> str:
    """A command that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def load_modules() -> None:
    """Load OpenZFS; twice is fine."""
    if Path("/sys/module/zfs").exists():
        return
    release = Path("/proc/sys/kernel/osrelease").read_text().strip()
    for name in _MODULES:
        path = Path(f"/usr/lib/modules/{release}/extra/{name}.ko")
        if path.exists():
            more = ["zfs_arc_max=67108864"] if name == "zfs" else []
            run("insmod", str(path), *more)
    # The kernel opens a pool's files by their paths from its own root, in which this one is /root.
    _SEEN_BY_THE_KERNEL.mkdir(parents=True, exist_ok=True)
    run("mount", "--bind", "/tmp", str(_SEEN_BY_THE_KERNEL))


@contextmanager
def pool(folder: Path, name: str, size_mib: int = 256) -> Iterator[str]:
    """An empty pool, whose file systems are mounted below `folder`."""
    load_modules()
    disk = Path("/root", folder.relative_to("/"), f"{name}.img")
    with disk.open("wb") as file:
        file.truncate(size_mib * MIB)
    run("zpool", "create", "-o", "cachefile=none", "-m", str(folder / name), name, str(disk))
    try:
        yield name
    finally:
        run("zpool", "destroy", "-f", name)
        disk.unlink()


def make_volume(pool_name: str, name: str, size_mib: int, *options: str) -> Disk:
    """A volume; the guest has no udev, so that it is addressed by its device."""
    run("zfs", "create", "-V", f"{size_mib}m", *options, f"{pool_name}/{name}")
    return Disk(name, str(node_of(f"{pool_name}/{name}")), size_mib * MIB)


@contextmanager
def links() -> Iterator[None]:
    """In place of udev, which the guest has not: the links that its rule for volumes makes (``60-zvol.rules``), by the
    same program.
    """
    ended = Event()
    thread = Thread(target=_keep_links, args=(ended,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _keep_links(ended: Event) -> None:
    made: dict[str, Path] = {}
    while not ended.wait(0.05):
        there = {entry.name for entry in Path("/sys/block").glob("zd*")}
        for gone in made.keys() - there:
            made.pop(gone).unlink()
        for new in there - made.keys():
            done = subprocess.run([_ZVOL_ID, f"/dev/{new}"], capture_output=True, text=True, check=False)
            if done.returncode == 0:  # else it is just coming, or going
                link = NODES / done.stdout.strip()
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(f"/dev/{new}")
                made[new] = link
