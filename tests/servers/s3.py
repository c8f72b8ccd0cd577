"""What tests need to know of an S3 server, whichever it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from tests.servers.processes import Processes
from vmsnap.testing.storage import RawObjects

_numbers = itertools.count(1)


@dataclass(frozen=True)
class S3Server:
    """A running server on the loopback."""

    name: str
    port: int
    access_key: str
    secret_key: str = field(repr=False)
    processes: Processes

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, port: int | None = None) -> dict[str, str]:
        """What a process that is to use it finds in its environment, and nothing of this machine's own settings.

        :param port: of a proxy in front of it
        """
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A client of boto3's own, beside the backend."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"}, max_pool_connections=4, request_checksum_calculation="when_required"
            ),
        )

    def new_bucket(self, **settings: Any) -> str:
        """The name of a bucket that is new and empty."""
        name = f"bucket-{next(_numbers)}"
        self.client().create_bucket(Bucket=name, **settings)
        return name


class Bucket(RawObjects):
    """Looks at a bucket below a prefix, past the backend."""

    def __init__(self, server: S3Server, bucket: str, prefix: str) -> None:
        """:param prefix: with the slash at its end"""
        self._client = server.client()
        self._bucket = bucket
        self._prefix = prefix

    def read(self, key: str) -> bytes | None:
        """See `RawObjects`."""
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
        except self._client.exceptions.NoSuchKey:
            return None
        content: bytes = found["Body"].read()
        return content

    def write(self, key: str, data: bytes) -> None:
        """See `RawObjects`."""
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def keys(self) -> list[str]:
        """See `RawObjects`. Unfinished uploads are shown too, as ``unfinished:KEY``."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        found = [entry["Key"].removeprefix(self._prefix) for page in pages for entry in page.get("Contents", ())]
        uploads = self._client.list_multipart_uploads(Bucket=self._bucket).get("Uploads", ())
        return found + [f"unfinished:{upload['Key'].removeprefix(self._prefix)}" for upload in uploads]
