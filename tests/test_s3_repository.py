"""Everything that a repository does, on a real S3 server; and a live backup of a real guest into it and out of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabMachine, available_qemus
from tests.lab import serial as console
from tests.proxy import Proxy, Trouble, http_answer
from tests.servers.s3 import Bucket, S3Server
from tests.test_live_backup_qemu import text_after_two_checks
from tests.world import MIB, World
from vmsnap.controller import Controller
from vmsnap.errors import StorageError, WrongPassphrase
from vmsnap.export import export_disks
from vmsnap.host import HostFolders
from vmsnap.places import create_repository, open_repository
from vmsnap.repository.retention import RetentionPolicy
from vmsnap_drivers.hypervisors.simulated import lifecycle
from vmsnap_drivers.hypervisors.simulated.control import ask


@pytest.fixture(params=["swift", "moto"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    found: S3Server = request.getfixturevalue(f"{request.param}_server")
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(memory_bytes=MIB, disk_bytes=64 * MIB)
    # Of which the guest itself writes few blocks.
    made.write_noise(3)
    yield made
    made.close()


def test_the_life_of_a_repository(server: S3Server, world: World, tmp_path: Path) -> None:
    bucket = server.new_bucket()
    url, objects = f"s3://{bucket}/a/prefix", Bucket(server, bucket, "a/prefix/")
    create_repository(url, "first words")
    with pytest.raises(WrongPassphrase):
        open_repository(url, "wrong words")
    repository = open_repository(url, "first words", cache_dir=tmp_path / "cache")
    with world.controller() as controller:
        full = controller.backup("vm001", repository)
        again = controller.backup("vm001", repository)
        assert again.stored_bytes < full.stored_bytes / 2
    assert {m.backup for m in repository.list()} == {full.backup, again.backup}
    assert not repository.verify(again.backup).findings
    exported = export_disks(repository, again.backup, tmp_path / "images")
    assert {path.stat().st_size for path in exported.values()} == {64 * MIB}
    repository.change_passphrase("other words")
    repository = open_repository(url, "other words", cache_dir=tmp_path / "cache")

    # A pack is damaged: check finds it, repair saves the rest, and the next backup is whole.
    packs = [key for key in list(objects.keys()) if key.startswith("packs/")]
    pack = max(packs, key=lambda key: len(objects.read(key) or b""))
    content = bytearray(objects.read(pack) or b"")
    content[len(content) // 2] ^= 1
    objects.write(pack, bytes(content))
    assert repository.check(read_data=True).damaged
    repository.repair()
    with world.controller() as controller:
        whole = controller.backup("vm001", repository)
    assert not repository.verify(whole.backup).findings

    repository.prune(RetentionPolicy(last=1))
    [kept] = repository.list()
    assert repository.gc().packs_deleted
    assert not repository.check(read_data=True).damaged
    assert not [
        key for key in list(objects.keys()) if key.startswith(("sessions/", "garbage/", "unfinished:", "probe-"))
    ]
    with world.controller() as controller:
        restored = controller.restore(repository, kept.backup, "back", run=True, target=tmp_path / "back")
        assert not ask(Path(restored.options["socket"]), "status")["fault"]
        lifecycle.stop(Path(restored.options["socket"]), force=True)
        controller.remove_vm("back")
    repository.storage.close()


def test_credentials_that_may_not_delete(server: S3Server, world: World) -> None:
    """The service refuses every DELETE, as a policy for append-only credentials has it: backups go on."""
    refused = http_answer(403, "Forbidden", "AccessDenied")
    url = f"s3://{server.new_bucket()}"
    with Proxy(("127.0.0.1", server.port)) as proxy:
        options = {"endpoint": f"http://127.0.0.1:{proxy.port}"}
        repository = create_repository(url, options=options)
        proxy.add(Trouble("answer", 0, after=b"DELETE /", answer=refused, times=10**6))
        with world.controller() as controller:
            first = controller.backup("vm001", repository)
            controller.backup("vm001", repository)
        with pytest.raises(StorageError, match="AccessDenied"):
            repository.forget(first.backup)
        assert len(repository.list()) == 2
        assert not repository.verify(first.backup).findings
        repository.storage.close()


@pytest.mark.qemu
def test_a_real_guest_live_into_a_bucket_and_back(swift_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in swift_server.environment().items():
        monkeypatch.setenv(name, value)
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    folders = HostFolders.find(place / "state")
    try:
        with (
            Proxy(("127.0.0.1", swift_server.port)) as proxy,
            LabMachine(place / "vm001", available_qemus()[-1]) as machine,
            Controller(folders) as controller,
        ):
            machine.wait_for_check(20)
            options = {"endpoint": f"http://127.0.0.1:{proxy.port}", "timeout": "2"}
            repository = create_repository(f"s3://{swift_server.new_bucket()}", options=options)
            controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
            troubles = [
                proxy.add(Trouble("cut", 500_000, after=b"/packs/")),
                proxy.add(Trouble("stall", 3_000_000, after=b"/packs/")),
                proxy.add(
                    Trouble("answer", 5, after=b"/index/", answer=http_answer(503, "Slow Down", "SlowDown"), times=2)
                ),
            ]
            backup = controller.backup("vm001", repository).backup
            assert all(trouble.struck for trouble in troubles)
            assert not repository.verify(backup).findings
            assert machine.faults() == []
            restored = controller.restore(repository, backup, "vm002", run=True)
            driver = controller.drivers.hypervisor("qemu", "vm002", restored.options)
            try:
                text = text_after_two_checks(Path(restored.options["qmp"]).parent / "serial.log")
                assert console.faults(text) == []
                machine.wait_for_count(machine.latest_count() + 1)
            finally:
                driver.destroy()
                driver.close()
            repository.storage.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(folders.memory_dir, ignore_errors=True)
