"""Puts objects: small ones in one request, large ones in parts that travel side by side.

Either way nothing is there before all of it is: an upload in parts makes its object by its last request alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from vmsnap.errors import StorageError
from vmsnap_storage_backends.s3.address import Place

Call = Callable[..., Any]
"""``call(what, operation, **arguments)``: one request of the client, its failures translated."""

PART_BYTES = 16 << 20
"""The protocol allows 5 MiB at least, and 10000 parts."""
PARTS_ABOVE_BYTES = 64 << 20
"""Packs are smaller: several of them travel side by side anyway, and an object that was put in one request is read
faster where services keep parts apart, as OpenStack Swift does.
"""
_MAX_PARTS = 10_000
STALE_SECONDS = 86400.0
"""Nobody works for so long on one upload."""


class Uploader:
    """Puts objects for one backend. May be used by several threads."""

    def __init__(
        self, call: Call, place: Place, threads: Callable[[], ThreadPoolExecutor], *, with_md5: bool = False
    ) -> None:
        """:param threads: for the parts of large objects
        :param with_md5: send ``Content-MD5`` as well, which S3 wants of what object lock may hold; the signature
            covers a SHA-256 of everything anyway, at half of its price
        """
        self._call = call
        self._place = place
        self._threads = threads
        self._with_md5 = with_md5

    def put(self, key: str, data: memoryview, **arguments: Any) -> None:
        """Put an object in one request, whatever its size. Atomic.

        :param arguments: further ones of the request
        """
        # boto3 takes no memoryview; for its hashes and the socket there must be one buffer anyway.
        self.put_body(key, bytes(data), **arguments)

    def put_body(self, key: str, body: Any, **arguments: Any) -> None:
        """The same with what boto3 takes as a body: bytes, or a file."""
        content = body if isinstance(body, bytes) else body.getvalue()
        self._call(
            f"store {key}",
            "put_object",
            Bucket=self._place.bucket,
            Key=self._place.full(key),
            Body=body,
            **self._check_sum(content),
            **arguments,
        )

    def put_in_parts(self, key: str, data: memoryview, **arguments: Any) -> None:
        """Put a large object. Atomic; when it fails, its parts are removed, or else by `abort_stale` one day."""
        what, where = f"store {key}", {"Bucket": self._place.bucket, "Key": self._place.full(key)}
        upload = self._call(what, "create_multipart_upload", **where, **arguments)["UploadId"]
        try:
            size = max(PART_BYTES, -(-len(data) // _MAX_PARTS))
            sending: list[Future[str]] = [
                self._threads().submit(self._put_part, where, upload, number, data[start : start + size])
                for number, start in enumerate(range(0, len(data), size), 1)
            ]
            try:
                tags = [part.result() for part in sending]
            except BaseException:
                for part in sending:
                    part.cancel()
                for part in sending:  # the caller takes its buffer back
                    if not part.cancelled():
                        part.exception()
                raise
            parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
            self._call(what, "complete_multipart_upload", **where, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with suppress(StorageError):
                self._call(what, "abort_multipart_upload", **where, UploadId=upload)
            raise

    def _put_part(self, where: dict[str, str], upload: str, number: int, data: memoryview) -> str:
        body = bytes(data)
        answer = self._call(
            f"store part {number} of {where['Key']}",
            "upload_part",
            **where,
            UploadId=upload,
            PartNumber=number,
            Body=body,
            **self._check_sum(body),
        )
        return str(answer["ETag"])

    def _check_sum(self, body: bytes) -> dict[str, str]:
        if not self._with_md5:
            return {}
        # RFC 1864
        return {"ContentMD5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()}

    def stale(self, older_than_seconds: float = STALE_SECONDS) -> Iterator[tuple[str, str, datetime]]:
        """Key in the bucket, upload and beginning of the uploads below our prefix that nobody works on any more."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        markers: dict[str, str] = {}
        while True:
            page = self._call(
                "list unfinished uploads",
                "list_multipart_uploads",
                Bucket=self._place.bucket,
                Prefix=self._place.prefix,
                **markers,
            )
            for found in page.get("Uploads", ()):
                if found["Initiated"] < before:
                    yield found["Key"], found["UploadId"], found["Initiated"]
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_stale(self, older_than_seconds: float = STALE_SECONDS) -> int:
        """Remove what dead writers left of large objects; returns how many. Idempotent."""
        removed = 0
        for key, upload, _ in self.stale(older_than_seconds):
            self._call(
                f"remove an unfinished upload of {key}",
                "abort_multipart_upload",
                Bucket=self._place.bucket,
                Key=key,
                UploadId=upload,
            )
            removed += 1
        return removed
