"""Everything that a repository does, on an SFTP server; and a live backup of a real guest into it and out of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine, find_qemu
from tests.lab import serial as console
from tests.lab.sshd import SshServer
from tests.test_live_backup_qemu import text_after_two_checks
from tests.test_repository_roundtrip import CHEAP, back_up, content_of
from vmsnap.controller import Controller
from vmsnap.errors import DamageFound, WrongPassphrase
from vmsnap.host import HostFolders
from vmsnap.places import create_repository, open_repository, storage_for
from vmsnap.repository import (
    BackupFields,
    BytesReader,
    DiskImage,
    ImageKind,
    Manifest,
    Repository,
    RetentionPolicy,
)

pytestmark = pytest.mark.sshd

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@pytest.fixture
def options(server: SshServer) -> dict[str, str]:
    return {"config": str(server.config_file)}


def back_up_on(repository: Repository, content: bytes, day: int) -> Manifest:
    with repository.writer() as writer:
        image = writer.add_image("disk", BytesReader(content), ImageKind.DISK)
        disk = DiskImage("vda", image.size_bytes, "raw", "/x", "file", image)
        fields = BackupFields(vm="vm001", hypervisor="simulated", mode="live", disks=(disk,))
        return writer.commit(fields, instant_ns=(20_000 + day) * 86_400 * 10**9)


def test_everything_that_a_repository_does(server: SshServer, options: dict[str, str], tmp_path: Path) -> None:
    url = server.url(tmp_path / "place")
    made = Repository.create(storage_for(url, options), "old word", key_cost=CHEAP)
    contents = [os.urandom(2 * MIB) for _ in range(3)]
    contents[1] = contents[0][:MIB] + contents[1][MIB:]
    backups = [back_up_on(made, content, day) for day, content in enumerate(contents)]
    assert backups[1].stats.stored_bytes < 1.3 * MIB, "an increment costs what has changed"
    made.change_passphrase("new word", cost=CHEAP)
    made.storage.close()

    with pytest.raises(WrongPassphrase):
        open_repository(url, "old word", options)
    repository = open_repository(url, "new word", options, cache_dir=tmp_path / "cache")
    repository.chunk_cache_bytes = 64 * MIB
    for backup, content in zip(backups, contents, strict=True):
        assert content_of(repository, backup.disks[0].image) == content
        repository.reader(backup.disks[0].image).restore_to_file(tmp_path / backup.backup)
        assert (tmp_path / backup.backup).read_bytes() == content
        assert not repository.verify(backup.backup).findings
    assert not repository.check(read_data=True).findings

    repository.prune(RetentionPolicy(last=1))
    assert [each.backup for each in repository.list()] == [backups[2].backup]
    before = sum(path.stat().st_size for path in (tmp_path / "place" / "packs").rglob("*") if path.is_file())
    repository.gc()
    repository.gc()
    after = sum(path.stat().st_size for path in (tmp_path / "place" / "packs").rglob("*") if path.is_file())
    assert after < before - 2 * MIB
    assert not repository.check(read_data=True).findings

    (pack,) = (p for p in (tmp_path / "place" / "packs").rglob("*") if p.is_file() and p.stat().st_size > MIB)
    data = bytearray(pack.read_bytes())
    data[MIB] ^= 1
    pack.write_bytes(data)
    assert repository.check(read_data=True).damaged
    report = repository.repair()
    assert report.changed and sum(touch.lost_bytes for touch in report.lost) == 128 << 10
    assert {finding.severity for finding in repository.check(read_data=True).findings} == {"lost"}
    with pytest.raises(DamageFound):
        content_of(open_repository(url, "new word", options), repository.list()[0].disks[0].image)
    again = back_up(repository, BytesReader(contents[2]))
    assert content_of(repository, again.disks[0].image) == contents[2]
    assert repository.sessions() == []
    assert list((tmp_path / "place" / ".unfinished").iterdir()) == []
    repository.storage.close()


@pytest.mark.qemu
def test_a_live_backup_of_a_real_guest_and_its_way_back(server: SshServer, options: dict[str, str]) -> None:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    folders = HostFolders.find(place / "state")
    try:
        with LabMachine(place / "vm001", find_qemu("7.2")) as machine, Controller(folders) as controller:
            machine.wait_for_check(40)
            repository = create_repository(server.url(place / "repository"), "x", options=options)
            controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
            before = machine.latest_count()
            result = controller.backup("vm001", repository)
            after = machine.latest_count()
            assert result.warnings == ()
            assert not repository.verify(result.backup).findings
            repository.storage.close()

            fresh = open_repository(server.url(place / "repository"), "x", options)
            restored = controller.restore(fresh, result.backup, "vm002", run=True)
            driver = controller.drivers.hypervisor("qemu", "vm002", restored.options)
            try:
                text = text_after_two_checks(Path(restored.options["qmp"]).parent / "serial.log")
                assert console.faults(text) == []
                assert before <= console.counts(text)[0] <= after + 200, "it goes on at the captured count"
                assert machine.faults() == []
                machine.wait_for_count(after + 1)
            finally:
                driver.destroy()
                driver.close()
            fresh.storage.close()
    finally:
        shutil.rmtree(folders.memory_dir, ignore_errors=True)
        shutil.rmtree(place)
