"""What ``vmsnap doctor`` says of room, of the clock, and of snapshots that cannot be taken."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.world import World
from vmsnap.controller import examination, hostclock
from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_storage_backends.local import LocalStorage

MIB = 1 << 20


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "vmsnap", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def of(found: list[tuple[str, Finding]], subject: str) -> Finding:
    (finding,) = (finding for _, finding in found if finding.subject == subject)
    return finding


def test_a_file_system_that_is_nearly_full_is_told(small: Path) -> None:
    assert examination._room("state folder", small).severity == "note"
    (of_repository, *_) = LocalStorage(str(small)).doctor()
    assert of_repository.severity == "missing" and "make room" in of_repository.cure
    (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 8 * MIB))
    found = examination._room("state folder", small)
    assert found.severity == "missing" and "make room" in found.cure


def test_the_clock_is_what_the_kernel_says(world: World) -> None:
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    assert hostclock.is_synchronised() == (state != 5)
    with world.controller() as controller:
        assert of(controller.doctor(), "clock").severity == ("ok" if state != 5 else "note")


def test_a_clock_that_nobody_keeps_right_is_told_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "is_synchronised", lambda: False)
    assert examination._clock().severity == "note" and "NTP" in examination._clock().cure


def test_a_snapshot_that_could_not_be_taken_is_told_and_nothing_is_made(world: World) -> None:
    with world.controller() as controller:
        assert not [found for _, found in controller.doctor("vm001") if found.severity == "missing"]
        mechanism = type(controller.drivers.mechanism("file"))
        before = world.files()
        with pytest.MonkeyPatch.context() as patch:

            def refuse(*_: object) -> None:
                raise VmsnapError("no room for it", cure="make room")

            patch.setattr(mechanism, "plan", refuse)
            missing = [found for _, found in controller.doctor("vm001") if found.severity == "missing"]
        assert [(found.message, found.cure) for found in missing] == [("no room for it", "make room")]
        assert world.files() == before
