"""What must outlive a power cut is brought to the disk: the file first, then the name in its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmsnap import durable
from vmsnap.model import Disk, SnapshotPlan, Window
from vmsnap_drivers.snapshots.qcow2 import record
from vmsnap_drivers.snapshots.qcow2.names import choose_names


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is brought to the disk from now on, in this order."""
    done: list[Path] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        sync(descriptor)
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", look)
    return done


def test_a_file_that_is_made_is_there_with_its_folders_and_replaces_none(tmp_path: Path, synced: list[Path]) -> None:
    file = tmp_path / "state" / "plans" / "one.json"
    durable.create(file, "a plan")
    assert synced == [tmp_path, tmp_path / "state", file, file.parent]
    assert file.read_text() == "a plan" and file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        durable.create(file, "another")
    assert file.read_text() == "a plan"


def test_the_record_of_a_snapshot_by_qcow2_is_on_the_disk_before_its_copy(tmp_path: Path, synced: list[Path]) -> None:
    state, images = tmp_path / "state", tmp_path / "images"
    images.mkdir()
    handle = {"qmp": "/run/vm001.qmp", "node": "disk0", "qdev": "disk0", "file": str(images / "disk0.raw")}
    disks = (Disk("disk0", handle["file"], 4096, handle=handle),)
    names = choose_names("vmsnap-test", disks, (images,), state, overlays=False, bitmaps=("",))
    record.write(SnapshotPlan("qcow2", "vmsnap-test", "vm001", disks, Window.FREE, names.to_data()), names)
    first, copy = map(Path, names.records)
    assert synced == [tmp_path, first, state, copy, images]
    assert first.read_text() == copy.read_text()
