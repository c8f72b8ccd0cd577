"""The S3 backend on real servers: the contract of every backend, and what is S3's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.s3 import Bucket, S3Server
from vmsnap.testing.storage import StorageContract
from vmsnap_storage_backends.s3 import S3Storage


@pytest.fixture(params=["swift", "moto"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
class TestContract(StorageContract):
    # Every put is durable here, and a listing has as many pages as its size is set to.
    state_machine_examples = 3
    many_objects = 60

    @pytest.fixture
    def bucket(self, server: S3Server) -> str:
        return server.new_bucket()

    @pytest.fixture
    def storage(self, bucket: str) -> Iterator[S3Storage]:
        backend = S3Storage(f"s3://{bucket}/some/prefix")
        backend.page_objects = 25
        backend.create()
        yield backend
        backend.close()

    @pytest.fixture
    def oracle(self, server: S3Server, bucket: str) -> Bucket:
        return Bucket(server, bucket, "some/prefix/")


@pytest.mark.usefixtures("environment")
def test_conditional_puts_are_found_out_and_not_assumed(server: S3Server) -> None:
    backend = S3Storage(f"s3://{server.new_bucket()}")
    # Swift looks for the object when a request begins: two that overlap both succeed.
    assert backend.properties().conditional_put == (server.name == "moto")
    backend.close()


def test_what_a_dead_writer_left_of_a_large_object_is_never_shown_and_goes(
    swift_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # moto says that every upload began in 2010.
    server = swift_server
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = server.new_bucket()
    backend, oracle = S3Storage(f"s3://{bucket}/p"), Bucket(server, bucket, "p/")
    begun = server.client().create_multipart_upload(Bucket=bucket, Key="p/packs/x")
    server.client().upload_part(
        Bucket=bucket, Key="p/packs/x", UploadId=begun["UploadId"], PartNumber=1, Body=bytes(5 << 20)
    )
    assert list(backend.list()) == []
    assert list(oracle.keys()) == ["unfinished:packs/x"]
    # A living one may work on it still.
    assert backend.uploader.abort_stale() == 0
    assert backend.uploader.abort_stale(older_than_seconds=-5) == 1
    assert list(oracle.keys()) == []
    backend.close()
