"""Object lock: what a backup needs cannot be deleted by anybody, for as long as newer backups need it and a while more.

On moto's server, which has it; Swift has not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.servers.s3 import S3Server
from vmsnap.errors import ObjectRetained, StorageError
from vmsnap.places import create_repository, open_repository
from vmsnap.repository import BackupFields, Repository
from vmsnap.repository.retention import RetentionPolicy
from vmsnap_storage_backends.s3 import S3Storage

DATA = os.urandom(300_000)


def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    environment(moto_server, monkeypatch)
    return moto_server.new_bucket(ObjectLockEnabledForBucket=True)


@pytest.fixture
def client(moto_server: S3Server) -> Any:
    return moto_server.client()


def lock(days: float, mode: str = "compliance") -> dict[str, str]:
    return {"object_lock": mode, "object_lock_days": str(days)}


def back_up(repository: Repository, content: bytes) -> str:
    with repository.writer() as writer:
        state = writer.add_blob("state", content)
        return writer.commit(BackupFields(vm="vm001", hypervisor="none", mode="live", device_state=state)).backup


def locks(client: Any, bucket: str) -> Mapping[str, datetime | None]:
    """Until when each object of the repository is locked."""
    found = client.list_objects_v2(Bucket=bucket)["Contents"]
    return {
        entry["Key"]: client.head_object(Bucket=bucket, Key=entry["Key"]).get("ObjectLockRetainUntilDate")
        for entry in found
    }


def test_what_a_backup_needs_is_locked_and_nothing_else(bucket: str, client: Any) -> None:
    create_repository(f"s3://{bucket}", "words", options=lock(30))
    repository = open_repository(f"s3://{bucket}", "words", lock(30))
    back_up(repository, DATA)
    wanted = datetime.now(UTC) + timedelta(days=30) - timedelta(minutes=5)
    found = locks(client, bucket)
    locked = {key.partition("/")[0] for key, until in found.items() if until and until >= wanted}
    assert locked == {"config", "keys", "packs", "manifests"}
    assert {key.partition("/")[0] for key, until in found.items() if not until} == {"index"}


def test_stolen_credentials_cannot_destroy_what_is_locked(bucket: str, client: Any) -> None:
    repository = create_repository(f"s3://{bucket}", options=lock(30))
    back_up(repository, DATA)
    for key, until in locks(client, bucket).items():
        [version] = client.list_object_versions(Bucket=bucket, Prefix=key)["Versions"]
        if until:
            with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
                client.delete_object(Bucket=bucket, Key=key, VersionId=version["VersionId"])
        client.delete_object(Bucket=bucket, Key=key)  # it is hidden now, and can be had back
        if until:
            markers = client.list_object_versions(Bucket=bucket, Prefix=key)["DeleteMarkers"]
            client.delete_object(Bucket=bucket, Key=key, VersionId=markers[0]["VersionId"])
    again = open_repository(f"s3://{bucket}", options=lock(30))
    again.repair()  # the index is gone, which is not locked: it stands in the packs too
    [manifest] = again.list()
    assert not again.verify(manifest.backup).findings


def test_what_is_locked_is_kept_and_it_is_said_until_when(bucket: str, client: Any) -> None:
    repository = create_repository(f"s3://{bucket}", options=lock(30))
    first, second = back_up(repository, DATA), back_up(repository, DATA[::-1])
    year = str((datetime.now(UTC) + timedelta(days=31)).year)
    with pytest.raises(ObjectRetained, match="is locked until") as caught:
        repository.forget(first)
    assert year in caught.value.message
    report = repository.prune(RetentionPolicy(last=1))
    assert not report.removed
    assert [verdict.backup for verdict in report.kept] == [first, second]
    assert report.kept[0].reasons[0].startswith("locked until")
    # What no backup needs any more, as after an attack: hidden manifests.
    client.delete_object(Bucket=bucket, Key=f"manifests/{first.lower()}")
    before = {key for key in locks(client, bucket) if key.startswith("packs/")}
    collected = repository.gc()
    assert collected.packs_locked and not collected.packs_deleted
    assert before <= set(locks(client, bucket))
    assert not repository.verify(second).findings


def test_a_locked_pack_that_somebody_wrote_over_is_whole_again_by_its_locked_version(bucket: str, client: Any) -> None:
    repository = create_repository(f"s3://{bucket}", options=lock(30))
    kept = back_up(repository, DATA)
    pack = max(key for key in locks(client, bucket) if key.startswith("packs/"))
    nonsense = client.put_object(Bucket=bucket, Key=pack, Body=b"nonsense")
    attacked = open_repository(f"s3://{bucket}", options=lock(30))
    report = attacked.repair()
    assert {touch.backup for touch in report.lost} == {kept}
    assert any("is locked until" in action and pack in action for action in report.actions)
    assert attacked.list()[0].lost
    # What the page on storage tells to do: the newer version goes, and with it the damage.
    client.delete_object(Bucket=bucket, Key=pack, VersionId=nonsense["VersionId"])
    again = open_repository(f"s3://{bucket}", options=lock(30))
    assert again.repair().whole_again == (kept,)
    assert not again.verify(kept).findings
    assert not again.check(read_data=True).findings


def test_without_locks_all_versions_go_with_an_object(bucket: str, client: Any) -> None:
    repository = create_repository(f"s3://{bucket}", options=lock(30))
    storage = S3Storage(f"s3://{bucket}", lock(30))
    for content in (b"1", b"2"):
        storage.put("sessions/x", content)
    storage.delete("sessions/x")
    storage.delete("sessions/x")
    found = client.list_object_versions(Bucket=bucket, Prefix="sessions/x")
    assert not found.get("Versions") and not found.get("DeleteMarkers")
    back_up(repository, DATA)
    found = client.list_object_versions(Bucket=bucket, Prefix="sessions/")
    assert not found.get("Versions") and not found.get("DeleteMarkers")


def test_newer_backups_lengthen_what_they_share_with_older_ones(bucket: str, client: Any) -> None:
    repository = create_repository(f"s3://{bucket}", options=lock(1))
    back_up(repository, DATA)
    before = locks(client, bucket)
    longer = open_repository(f"s3://{bucket}", options=lock(60))
    back_up(longer, DATA)
    after = locks(client, bucket)
    wanted = datetime.now(UTC) + timedelta(days=59)
    for key, until in before.items():
        if key.startswith(("packs/", "config")):
            assert until and until < wanted <= (after[key] or until)
    # What is locked for longer than this backup wants stays so.
    back_up(open_repository(f"s3://{bucket}", options=lock(2)), DATA)
    assert locks(client, bucket)["config"] == after["config"]


def test_a_service_without_object_lock_is_refused(swift_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(swift_server, monkeypatch)
    bucket = swift_server.new_bucket()
    with pytest.raises(StorageError, match="has no object lock"):
        create_repository(f"s3://{bucket}", options=lock(30))
    repository = create_repository(f"s3://{bucket}")
    locking = open_repository(f"s3://{bucket}", options=lock(30))
    with pytest.raises(StorageError, match="has no object lock"):
        back_up(locking, DATA)
    assert repository.list() == []
    [missing] = [f for f in S3Storage(f"s3://{bucket}", lock(30)).doctor() if f.severity == "missing"]
    assert "no object lock" in missing.message
