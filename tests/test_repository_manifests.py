"""Manifests: nothing that stands in one can mislead, and backups are found and forgotten by their names."""

from __future__ import annotations

import json

import pytest

from tests.damage import image_with, make, manifest_with, seal_plain
from tests.test_repository_roundtrip import content_of
from vmsnap.errors import DamageFound, RepositoryError, UnknownBackup
from vmsnap.repository import DiskImage, MemoryImage, Repository
from vmsnap.repository.manifest import open_manifest, seal_manifest


@pytest.fixture(params=[None, "pass"], ids=["plain", "encrypted"])
def passphrase(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


EVIL: list[dict[str, object]] = [
    {"vm": "../vm1", "backup": "../vm1-20261123T021530Z-a1b2c3"},
    {"backup": "../../etc/passwd"},
    {"backup": "vm1-20261123T021530Z-zzzzzz"},
    {"backup": "vm2-20261123T021530Z-a1b2c3"},
    {"tags": ("line\nbreak",)},
    {"memory": (MemoryImage("a\0b", 4096, image_with()),)},
    {"memory": (MemoryImage("", 4096, image_with()),)},
    {"memory": (MemoryImage("r", 4096, image_with()), MemoryImage("r", 4096, image_with()))},
    *(
        {"disks": (DiskImage(name, 5, "raw", "/x", "file", image_with()),)}
        for name in ("../x", "/etc/x", "a/b", "", "..", ".x", "-x", "a\nb", "x" * 201)
    ),
    *(
        {"device_state": image_with(**change)}
        for change in (
            {"size_bytes": -1},
            {"size_bytes": 1 << 63},
            {"chunk_bytes": 0},
            {"chunk_bytes": 1 << 30},
            {"chunk_bytes": 5000},
            {"fanout": 0},
            {"fanout": 1},
            {"fanout": 1 << 20},
            {"depth": 0},
            {"depth": 1000},
            {"root": "00"},
            {"root": "xx" * 32},
        )
    ),
    {"disks": (DiskImage("disk0", 6, "raw", "/x", "file", image_with()),)},
]  # fmt: skip


@pytest.mark.parametrize("change", EVIL, ids=str)
def test_a_manifest_that_wants_out_is_refused(change: dict[str, object]) -> None:
    storage, repository, _, _ = make(None)
    manifest = manifest_with(**change)
    sealed = repository.vault.seal_object("manifests/vm1-20261123t021530z-a1b2c3", seal_plain(manifest))
    storage.raw["manifests/vm1-20261123t021530z-a1b2c3"] = sealed
    with pytest.raises(DamageFound):
        repository.manifest("vm1-20261123T021530Z-a1b2c3")
    found: list[DamageFound] = []
    assert len(repository.list(found.append)) == 2
    assert len(found) == 1
    assert "\n" not in str(found[0])


def test_a_good_manifest_passes_and_unknown_fields_are_passed_over() -> None:
    storage, repository, _, _ = make("x")
    manifest = manifest_with()
    key, data = seal_manifest(repository.vault, manifest)
    assert open_manifest(repository.vault, key, data) == manifest
    newer = json.loads(seal_plain(manifest)) | {"colour": "blue"}
    storage.raw[key] = repository.vault.seal_object(key, json.dumps(newer).encode())
    assert repository.manifest(manifest.backup) == manifest
    storage.raw[key] = repository.vault.seal_object(key, json.dumps(newer | {"version": 2}).encode())
    with pytest.raises(RepositoryError, match="format 2"):
        repository.manifest(manifest.backup)


@pytest.mark.parametrize(
    "region", ["pc.ram", "/rom@etc/acpi/tables", "../../x", "..", ".", "-rf", "0000:00:02.0/vga.vram", "ü %"]
)
def test_regions_give_file_names_that_stay_in_their_folder(region: str) -> None:
    name = MemoryImage(region, 4096, image_with()).file_name
    assert "/" not in name
    assert name[0] not in ".-"
    assert len({MemoryImage(other, 1, image_with()).file_name for other in (region, region + "x", "%2E.")}) == 3


def test_backups_are_found_by_the_beginning_of_their_id() -> None:
    _, repository, _, manifests = make(None)
    assert repository.manifest("vm0").backup == manifests[0].backup
    assert repository.manifest(manifests[1].backup[:-1]) == manifests[1]
    for name in ("vm", "", "vm2", "nothing", "../vm0", "vm0/", "VM0", "v" * 300):
        with pytest.raises(UnknownBackup):
            repository.manifest(name)


def test_a_forgotten_backup_is_gone_and_the_others_stay(passphrase: str | None) -> None:
    storage, repository, contents, manifests = make(passphrase)
    repository.forget(manifests[0].backup)
    assert repository.list() == [manifests[1]]
    for name in (manifests[0].backup, "vm1", "../x", ""):
        with pytest.raises(UnknownBackup):
            repository.forget(name)
    again = Repository.open(storage, passphrase)
    assert content_of(again, manifests[1].disks[0].image) == contents[1]
    assert not again.check(read_data=True).findings
