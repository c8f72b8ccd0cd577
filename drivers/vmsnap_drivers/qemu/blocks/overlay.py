"""The overlay: the guest's device is connected to an empty one above its disk, which stays as it was at that instant.

Two need it. The mechanism ``qcow2``, where no filter may stand in the graph because the disks are about to be handed
over (pre-copy): inactivating a ``copy-before-write`` filter's target fails (QEMU 7.2 and 10.0, tried). And `freeze`,
for snapshots of the disk that are too slow for the pause.

It is dangerous for as long as it lasts: the newest data of the guest are not in its disk. So the mechanism, as soon as
the guest runs again, puts its filter between overlay and disk, and the overlay is committed *through* it: from then on
it is ordinary fleecing, and the overlay has lived for tens of milliseconds.

The device is connected to an overlay that has its backing node from the start, rather than by ``blockdev-snapshot``:
that would reopen the disk read-only, and then the filter's file could not be written.

The overlay's file tells by its name how far that came, for the case that QEMU and we both die meanwhile (`salvage`)::

    …overlay.qcow2             the disk is as it was at the instant
    …overlay.qcow2.committing  the overlay holds all of the guest's data, the disk a part of them
    …overlay.qcow2.pivoting    both hold all; which one the guest writes to is not known from outside
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.durable import remove
from vmsnap.errors import SnapshotError
from vmsnap.model import Disk
from vmsnap_drivers.qemu.blocks.graph import BlockGraph, Deadline
from vmsnap_drivers.qemu.blocks.image import sync

_COMMIT_SECONDS: Final = 600.0


@dataclass(frozen=True)
class OverlayNames:
    """What is made for the overlay of one disk. `overlay` and `image` (the overlay's file) are names of block nodes,
    `commit_job` is the job which puts the overlay back, through the node `filter` where there is one of that name.
    `overlay_file` is an absolute path, empty where no overlay is needed.
    """

    overlay: str
    image: str
    commit_job: str
    overlay_file: str
    filter: str

    @property
    def committing_file(self) -> str:
        """What the overlay's file is called from the moment on at which its content begins to go back."""
        return f"{self.overlay_file}.committing"

    @property
    def pivoting_file(self) -> str:
        """What it is called from the moment on at which the guest may write to its disk itself again."""
        return f"{self.overlay_file}.pivoting"


@dataclass(frozen=True)
class _Commit:
    disk: Disk
    names: OverlayNames
    base: str
    running: bool


def add_overlay(graph: BlockGraph, disk: Disk, names: OverlayNames) -> None:
    """Add the overlay above the disk, as durable as the disk is; its file is there and empty. The guest's device is
    not connected to it yet.

    :raises SnapshotError: QEMU refused
    """
    node = graph.node(disk.handle["node"])
    if node is None:
        raise SnapshotError(f"the node of disk {disk.device} is gone")
    cache = _cache_of(node["cache"])
    graph.add({"driver": "file", "node-name": names.image, "filename": names.overlay_file, "cache": cache})
    graph.add(_options(names, disk.handle["node"], cache))


def put_back(graph: BlockGraph, disks: Sequence[tuple[Disk, OverlayNames]]) -> None:
    """Write the overlays' content into the disks, through the filter where one is there, connect the guest's devices
    to what is below the overlays, and remove these. The guest may run. Idempotent; goes on where another process
    stopped. Blocks.

    :raises SnapshotError: it failed; the guest goes on with the overlay, and a later call tries again
    """
    nodes = graph.node_names()
    commits = []
    for disk, names in disks:
        # While its commit runs, a filter of QEMU's own stands above the overlay.
        running = graph.job(names.commit_job) is not None
        if names.overlay in nodes and (running or graph.top_of(disk) == names.overlay):
            commits.append(
                _Commit(disk, names, names.filter if names.filter in nodes else disk.handle["node"], running)
            )
    # The steps go abreast, so that names are brought to the disk once for all, and the overlays' lives are short.
    _rename((commit.names.overlay_file, commit.names.committing_file) for commit in commits)
    mark = graph.monitor.mark()
    for commit in commits:
        if not commit.running:
            _start(graph, commit)
    for commit in commits:
        _await_ready(graph, commit, mark)
    _rename((commit.names.committing_file, commit.names.pivoting_file) for commit in commits)
    mark = graph.monitor.mark()
    for commit in commits:
        graph.call("job-complete", {"id": commit.names.commit_job})
    for commit in commits:
        _await_end(graph, commit, mark)


def remove_unconnected(graph: BlockGraph, disk: Disk, names: OverlayNames) -> None:
    """Remove the overlay's nodes if the guest does not use them. What the file still holds is for `salvage` to judge.

    :raises SnapshotError: QEMU refused, or the guest uses the overlay
    """
    nodes = graph.node_names()
    if names.overlay in nodes:
        if graph.top_of(disk) == names.overlay:
            raise SnapshotError(f"the guest still writes to the overlay of disk {disk.device}")
        graph.remove(names.overlay)
    if names.image in nodes:
        graph.remove(names.image)


def is_pivoted(graph: BlockGraph, disk: Disk, names: OverlayNames) -> bool:
    """Say whether an overlay is there that the guest surely does not need: this QEMU knows it, and the guest's device
    is connected to its disk.
    """
    return names.overlay in graph.node_names() and graph.top_of(disk) in (disk.handle["node"], names.filter)


def remove_files(names: OverlayNames) -> None:
    """Remove the overlay's file under each of its names; succeeds where there is none. It must hold nothing."""
    remove(*map(Path, (names.overlay_file, names.committing_file, names.pivoting_file)))


def _start(graph: BlockGraph, commit: _Commit) -> None:
    names = commit.names
    overlay = graph.node(names.overlay)
    if overlay is None:
        raise SnapshotError(f"the overlay {names.overlay} is gone")
    if commit.base == names.filter:
        graph.call("blockdev-reopen", {"options": [_options(names, commit.base, _cache_of(overlay["cache"]))]})
    graph.call("block-commit", {"job-id": names.commit_job, "device": names.overlay, "base-node": commit.base})


def _await_ready(graph: BlockGraph, commit: _Commit, mark: int) -> None:
    deadline, done_bytes = Deadline(_COMMIT_SECONDS), 0
    name = commit.names.commit_job
    while True:
        _touch(commit.names.committing_file)
        job = graph.job(name)
        if job is not None and job["offset"] > done_bytes:  # much to put back takes long, and is not hung
            deadline, done_bytes = Deadline(_COMMIT_SECONDS), job["offset"]
        if (job is not None and job["ready"]) or graph.await_job(name, mark, until_ready=True):
            return
        deadline.check(f"putting the overlay of disk {commit.disk.device} back")


def _await_end(graph: BlockGraph, commit: _Commit, mark: int) -> None:
    deadline = Deadline(_COMMIT_SECONDS)
    disk, names = commit.disk, commit.names
    while not graph.await_job(names.commit_job, mark, until_ready=False):
        deadline.check(f"ending the overlay of disk {disk.device}")
    if (top := graph.top_of(disk)) != commit.base:
        raise SnapshotError(f"disk {disk.device} stands on {top} after its overlay was put back, not on {commit.base}")
    remove_unconnected(graph, disk, names)
    remove_files(names)


def _rename(pairs: Iterable[tuple[str, str]]) -> None:
    """Durable before the next step begins; what another process renamed already is left."""
    folders = set()
    for old, new in pairs:
        if Path(old).exists():
            Path(old).rename(new)
            folders.add(Path(new).parent)
    for folder in folders:
        sync(folder)


def _touch(path: str) -> None:
    """Set the file's time, so that `salvage` can tell writes of the running commit from later ones of others."""
    if Path(path).exists():
        os.utime(path)


def _options(names: OverlayNames, backing: str, cache: dict[str, object]) -> dict[str, object]:
    return {
        "driver": "qcow2",
        "node-name": names.overlay,
        "file": names.image,
        "backing": backing,
        "cache": cache,
    }


def _cache_of(node: dict[str, object]) -> dict[str, object]:
    return {"direct": node["direct"], "no-flush": node["no-flush"]}
