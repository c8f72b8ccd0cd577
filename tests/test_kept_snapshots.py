"""Snapshots that were asked for by hand are kept until they are deleted, and known from before they exist."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.test_file_mechanism import plain_disk
from tests.world import FaultyDrivers
from vmsnap.controller import Controller, Drivers
from vmsnap.controller.kept_snapshots import KeptSnapshots
from vmsnap.errors import AlreadyExists, Busy, NotFound, SnapshotError, UsageError
from vmsnap.host import HostFolders
from vmsnap.locks import vm_lock
from vmsnap.model import Disk
from vmsnap.roles import SnapshotMechanism
from vmsnap.testing.faults import Effect, Fault, FaultPlan

SIZE = 1 << 20


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two files that the mechanism ``file`` takes, for which otherwise a hypervisor must vouch."""

    def vouched(_: SnapshotMechanism, device: str, address: str) -> Disk:
        return plain_disk(Path(address), SIZE, device)

    monkeypatch.setattr(SnapshotMechanism, "disk_at", vouched)
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(os.urandom(SIZE))
    return [str(path) for path in paths]


def kept_in(folders: HostFolders, *faults: Fault) -> KeptSnapshots:
    context = folders.context()
    drivers = FaultyDrivers(context, FaultPlan(*faults)) if faults else Drivers(context)
    return KeptSnapshots(drivers, folders.state_dir / KeptSnapshots.FOLDER)


def files(images: list[str]) -> set[str]:
    return {path.name for path in Path(images[0]).parent.iterdir()}


def test_it_says_whether_the_disks_show_one_instant(folders: HostFolders, images: list[str]) -> None:
    kept = kept_in(folders)
    assert not kept.take("file", images).one_instant, "files are copied one after the other"
    assert kept.take("file", images[:1]).one_instant


def test_a_snapshot_is_taken_listed_cloned_and_deleted(folders: HostFolders, images: list[str]) -> None:
    kept = kept_in(folders)
    contents = [Path(image).read_bytes() for image in images]
    name = kept.take("file", images).plan.tag
    Path(images[0]).write_bytes(bytes(SIZE))
    disks = kept_in(folders).clone("file", name, "trial")
    assert [Path(disk.address).read_bytes() for disk in disks] == contents
    (found,) = kept_in(folders).all("file")
    assert found.plan.tag == name and len(found.taken) == 2 and [clone.disk for clone in found.clones] == list(disks)
    assert kept.all("qcow2") == []
    with Controller(folders) as controller:
        assert controller.strays() == []
    with pytest.raises(AlreadyExists, match="has clones named 'trial'"):
        kept.clone("file", name, "trial")
    with pytest.raises(SnapshotError, match="has clones: trial"):
        kept.delete("file", name)
    kept.delete("file", name, "trial")
    assert not any(Path(disk.address).exists() for disk in disks)
    kept.delete("file", name)
    assert files(images) == {"a", "b"} and kept.all("file") == []
    with pytest.raises(NotFound, match="there is no snapshot"):
        kept.delete("file", name)


def test_one_at_a_time_clones_a_snapshot_or_deletes_it(folders: HostFolders, images: list[str]) -> None:
    kept = kept_in(folders)
    name = kept.take("file", images).plan.tag
    with vm_lock(folders.state_dir / KeptSnapshots.FOLDER, name, "clone", kind="snapshot"):
        for work in (lambda: kept.clone("file", name, "trial"), lambda: kept.delete("file", name)):
            with pytest.raises(Busy, match=f"snapshot '{name}' is busy: clone by process"):
                work()
    kept.delete("file", name)
    assert files(images) == {"a", "b"}


@pytest.mark.parametrize("call", ["prepare_disks", "snapshot", "settle"])
@pytest.mark.parametrize("effect", [Effect.BEFORE, Effect.AFTER])
def test_what_fails_leaves_nothing(folders: HostFolders, images: list[str], call: str, effect: Effect) -> None:
    with pytest.raises(SnapshotError):
        kept_in(folders, Fault(call, 1, effect)).take("file", images)
    assert files(images) == {"a", "b"} and kept_in(folders).all("file") == []


@pytest.mark.parametrize("call", ["prepare_disks", "snapshot", "settle"])
def test_what_is_killed_is_known_and_can_be_deleted(folders: HostFolders, images: list[str], call: str) -> None:
    child = os.fork()
    if child == 0:
        try:
            kept_in(folders, Fault(call, 1, Effect.KILL_AFTER)).take("file", images)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    kept = kept_in(folders)
    (found,) = kept.all("file")
    assert not found.taken
    with pytest.raises(SnapshotError, match="was not taken to its end"):
        kept.clone("file", found.plan.tag, "trial")
    kept.delete("file", found.plan.tag)
    assert files(images) == {"a", "b"} and kept.all("file") == []


def test_what_cannot_be_deleted_stays_known(folders: HostFolders, images: list[str]) -> None:
    name = kept_in(folders).take("file", images).plan.tag
    with pytest.raises(SnapshotError):
        kept_in(folders, Fault("delete_snapshots", 1, Effect.BEFORE)).delete("file", name)
    assert [found.plan.tag for found in kept_in(folders).all("file")] == [name]
    kept_in(folders).delete("file", name)
    assert files(images) == {"a", "b"}


def test_a_clone_that_fails_leaves_nothing(folders: HostFolders, images: list[str]) -> None:
    name = kept_in(folders).take("file", images).plan.tag
    with pytest.raises(SnapshotError):
        kept_in(folders, Fault("clone", 2, Effect.AFTER)).clone("file", name, "trial")
    (found,) = kept_in(folders).all("file")
    assert found.clones == () and not list((folders.state_dir / "snapshots" / "clones").iterdir())
    kept_in(folders).delete("file", name)


def test_names_from_outside_stay_names(folders: HostFolders, images: list[str]) -> None:
    kept = kept_in(folders)
    for name in ("../../etc/passwd", "vmsnap-1", "", "vmsnap-by-hand-0123456789/x"):
        with pytest.raises(NotFound, match="is no name of a snapshot"):
            kept.delete("file", name)
    taken = kept.take("file", images[:1])
    with pytest.raises(UsageError, match="not a valid name of a clone"):
        kept.clone("file", taken.plan.tag, "../x")
    kept.delete("file", taken.plan.tag)


def test_what_the_mechanism_does_not_serve_is_refused(folders: HostFolders, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(SIZE))
    with pytest.raises(UsageError, match="'file' does not serve"):
        kept_in(folders).take("file", [str(path)])
    for nothing in (tmp_path / "nothing", path / "below-a-file"):
        with pytest.raises(NotFound, match=f"there is no {nothing}"):
            kept_in(folders).take("file", [str(nothing)])
    with pytest.raises(UsageError, match="cannot be read: embedded null byte"):
        kept_in(folders).take("file", [f"{tmp_path}/a\0b"])
