"""What the options of the S3 backend bring about at a server, and credentials that run out while a backup is stored."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.proxy import Proxy, Trouble, http_answer
from tests.servers.s3 import S3Server
from tests.servers.swift import DOMAIN
from tests.world import World
from vmsnap.errors import StorageError
from vmsnap.repository import Repository
from vmsnap.retrying import RetryingStorage, RetryPolicy
from vmsnap_storage_backends.s3 import S3Storage

HASTY = RetryPolicy(attempts=3, first_wait_seconds=0.01, longest_wait_seconds=0.02)
EXPIRED = http_answer(400, "Bad Request", "ExpiredToken")


@pytest.fixture
def credentials(swift_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The credentials file of AWS's tools, the only place where there are any."""
    for name, value in swift_server.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    write_credentials(path, swift_server, "morning")
    return path


def write_credentials(path: Path, server: S3Server, token: str) -> None:
    path.write_text(
        f"[default]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
        f"aws_session_token = {token}\n"
    )


@pytest.fixture
def proxy(swift_server: S3Server) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", swift_server.port)) as between:
        yield between


def opened(server: S3Server, proxy: Proxy) -> Repository:
    options = {"endpoint": f"http://127.0.0.1:{proxy.port}"}
    return Repository.create(RetryingStorage(S3Storage(f"s3://{server.new_bucket()}/vmsnap", options), HASTY))


def test_a_backup_goes_on_with_the_credentials_that_took_the_place_of_those_that_ran_out(
    swift_server: S3Server, credentials: Path, proxy: Proxy, world: World
) -> None:
    repository = opened(swift_server, proxy)
    expired = proxy.add(Trouble("answer", 0, after=b"/packs/", answer=EXPIRED))
    renewed = proxy.add(Trouble("slow", 0, after=b"X-Amz-Security-Token: evening", bytes_per_second=1 << 40))
    write_credentials(credentials, swift_server, "evening")
    with world.controller() as controller:
        made = controller.backup("vm001", repository)
    assert expired.struck == 1 and renewed.struck == 1
    assert not repository.verify(made.backup).findings
    repository.storage.close()


def test_credentials_that_ran_out_and_were_not_renewed_are_named(
    swift_server: S3Server, credentials: Path, proxy: Proxy, world: World
) -> None:
    repository = opened(swift_server, proxy)
    expired = proxy.add(Trouble("answer", 0, after=b"/packs/", answer=EXPIRED, times=100))
    with world.controller() as controller, pytest.raises(StorageError, match="ExpiredToken") as caught:
        controller.backup("vm001", repository)
    assert caught.value.cure == "get new credentials; those here have run out"
    assert expired.struck <= 3, "what cannot help is not tried again"
    world.see_that_all_is_well()
    repository.storage.close()


def test_packs_have_the_storage_class_and_nothing_else_has(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    for name, value in moto_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = moto_server.new_bucket()
    repository = Repository.create(S3Storage(f"s3://{bucket}/vmsnap", {"storage_class": "STANDARD_IA"}))
    with world.controller() as controller:
        controller.backup("vm001", repository)
    classes: dict[bool, set[str]] = {True: set(), False: set()}
    for found in moto_server.client().list_objects_v2(Bucket=bucket)["Contents"]:
        classes["/packs/" in found["Key"]].add(found["StorageClass"])
    assert classes == {True: {"STANDARD_IA"}, False: {"STANDARD"}}
    repository.storage.close()


def test_the_bucket_can_stand_in_the_host_name(
    swift_server: S3Server, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """There is no name server here: the names below the service's domain are resolved in its place."""
    resolve, asked = socket.getaddrinfo, set()

    def resolved(host: Any, *rest: Any, **more: Any) -> Any:
        if str(host).endswith(DOMAIN):
            asked.add(str(host))
            host = "127.0.0.1"
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    for name, value in swift_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = swift_server.new_bucket()
    options = {"endpoint": f"http://{DOMAIN}:{swift_server.port}", "addressing": "virtual"}
    repository = Repository.create(S3Storage(f"s3://{bucket}/vmsnap", options))
    with world.controller() as controller:
        made = controller.backup("vm001", repository)
    assert asked == {f"{bucket}.{DOMAIN}"}
    assert not repository.verify(made.backup).findings
    assert swift_server.client().list_objects_v2(Bucket=bucket, Prefix="vmsnap/manifests/")["KeyCount"] == 1
    repository.storage.close()
