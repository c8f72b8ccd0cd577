"""Objects of the repository as objects of a bucket."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar

from vmsnap.errors import ObjectExists, ObjectNotFound, StorageError, TransientStorageError
from vmsnap.model import Finding
from vmsnap.roles import Module, Need, Option
from vmsnap.roles.storage import ObjectInfo, StorageBackend, StorageProperties, check_key
from vmsnap_storage_backends.s3 import upload
from vmsnap_storage_backends.s3.address import OPTIONS, parse_place, parse_settings
from vmsnap_storage_backends.s3.conditional import overlapping_puts_exclude_each_other
from vmsnap_storage_backends.s3.connection import Connection
from vmsnap_storage_backends.s3.failures import CREDENTIALS, code_of, status_of, translate
from vmsnap_storage_backends.s3.retention import Retention

_THREADS = 8
_PROBE = "probe-"
_PACKS = "packs/"
_WITHOUT_CONDITIONS = ("NotImplemented", "InvalidArgument")


class S3Storage(StorageBackend):
    """Keeps objects in a bucket of any service that speaks S3: Amazon's, Ceph, MinIO, OpenStack Swift and others.

    URL: ``s3://bucket/prefix``. The bucket must exist. Every upload carries a check sum that the service verifies.
    `put` with `if_absent` uses conditional puts (``If-None-Match: *``, RFC 9110 section 13.1.2), and looks first unless
    these were found to be atomic.
    """

    name: ClassVar[str] = "s3"
    options: ClassVar[Sequence[Option]] = OPTIONS
    needs: ClassVar[Sequence[Need]] = (Module("boto3", "pip install 'vmsnap[s3]'"),)
    page_objects: int = 1000
    """How many objects a page of a listing has; the protocol allows a thousand at most."""

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        super().__init__(url, options or {})
        self.place = parse_place(url)
        self.settings = parse_settings(options or {})
        self.retention_seconds = self.settings.lock_seconds
        self.connection = Connection(self.settings)
        self.uploader = upload.Uploader(self.call, self.place, self._pool, with_md5=bool(self.settings.lock_mode))
        self.retention = Retention(self.call, self.place, self.settings)
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._conditional: bool | None = None
        self._swept = False

    def create(self) -> None:
        """See that the bucket can be used. It is not made: where its data lies, who pays and who reads is for its
        owner to say.

        :raises StorageError: it does not exist, cannot be listed, or has no object lock and is to have it
        """
        self.call("use", "list_objects_v2", Bucket=self.place.bucket, Prefix=self.place.prefix, MaxKeys=1)
        self.retention.require()

    def put(self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False) -> None:
        """See `StorageBackend.put`."""
        check_key(key)
        view = memoryview(data).cast("B")
        extra: dict[str, Any] = {}
        if self.settings.storage_class and key.startswith(_PACKS):
            extra["StorageClass"] = self.settings.storage_class
        if if_absent:
            self._put_if_absent(key, view, extra)
        elif len(view) > upload.PARTS_ABOVE_BYTES:
            self._sweep_once()
            self.uploader.put_in_parts(key, view, **extra)
        else:
            self.uploader.put(key, view, **extra)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `StorageBackend.get`."""
        check_key(key)
        if offset < 0 or (length is not None and length < 0):
            raise StorageError(f"{key}: there is no range of {length} bytes from {offset}")
        if length == 0 or (length is None and offset):
            # A range of nothing cannot be asked for, and one that begins at the end is refused.
            size = self.stat(key).size_bytes
            if offset + (length or 0) > size:
                raise StorageError(f"{key} has {size} bytes, and {offset + (length or 0)} were asked for")
            length = size - offset if length is None else 0
            if not length:
                return b""
        wanted = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
        content = self._read(key, wanted)
        if length is not None and len(content) != length:
            raise StorageError(f"{key} has {offset + len(content)} bytes, and {offset + length} were asked for")
        return content

    def stat(self, key: str) -> ObjectInfo:
        """See `StorageBackend.stat`."""
        check_key(key)
        found = self.call(f"look at {key}", "head_object", key, Bucket=self.place.bucket, Key=self.place.full(key))
        return ObjectInfo(key, found["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `StorageBackend.list`. Holds one page at a time."""
        where = {"Bucket": self.place.bucket, "Prefix": self.place.full(prefix)}
        arguments: dict[str, Any] = {**where, "MaxKeys": self.page_objects}
        while True:
            page = self.call("list", "list_objects_v2", **arguments)
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self.place.prefix)
                if key:  # else it stands for the prefix itself, as consoles make "folders"
                    yield ObjectInfo(key, found["Size"])
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """See `StorageBackend.delete`. With object lock all versions of it go, or none.

        :raises ObjectRetained: it is locked
        """
        check_key(key)
        if self.settings.lock_mode:
            self.retention.delete(key)
            return
        self.call(f"delete {key}", "delete_object", Bucket=self.place.bucket, Key=self.place.full(key))

    def properties(self) -> StorageProperties:
        """See `StorageBackend.properties`. Finds out about conditional puts, which needs the permission to write."""
        return StorageProperties(conditional_put=self._has_conditional_put())

    def retain(self, keys: Iterable[str], until: datetime) -> None:
        """See `StorageBackend.retain`. One or two requests for each key, several at once."""
        self.retention.require()
        for _ in self._pool().map(lambda key: self.retention.retain(check_key(key), until), keys):
            pass

    def retained(self, keys: Iterable[str]) -> dict[str, datetime]:
        """See `StorageBackend.retained`. One request for each key, several at once."""
        if not self.settings.lock_mode:
            return {}
        found = self._pool().map(lambda key: (key, self.retention.locked_now(check_key(key))), keys)
        return {key: until for key, until in found if until}

    def doctor(self) -> Sequence[Finding]:
        """See `StorageBackend.doctor`."""
        from vmsnap_storage_backends.s3.doctor import examine

        return examine(self)

    def close(self) -> None:
        """End threads and connections; idempotent."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads:
            threads.shutdown(wait=True, cancel_futures=True)
        self.connection.close()

    # -- inside

    def call(self, what: str, operation: str, key: str = "", **arguments: Any) -> Any:
        """One request. `key` says whose absence a 404 without a code means.

        :raises VmsnapError: see `failures.translate`
        """
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.connection.client()
        try:
            answer = getattr(client, operation)(**arguments)
        except (BotoCoreError, ClientError, OSError) as e:
            raise self._failure(e, what, key, client) from e
        self.connection.reached = True
        return answer

    def _failure(self, error: Exception, what: str, key: str, client: Any) -> Exception:
        self.connection.reached |= bool(status_of(error))
        if key and status_of(error) == 404 and code_of(error) in ("404", "NotFound", "NoSuchKey", ""):
            return ObjectNotFound(f"there is no {key} in {self.place}")
        found = translate(error, f"{what} in {self.place}", reached=self.connection.reached)
        if code_of(error) in CREDENTIALS and self.connection.renew(client):
            return TransientStorageError(str(found))
        return found

    def _read(self, key: str, wanted: dict[str, str]) -> bytes:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError  # botocore passes some of them on

        what = f"read {key}"
        try:
            answer = self.call(what, "get_object", key, Bucket=self.place.bucket, Key=self.place.full(key), **wanted)
            content: bytes = answer["Body"].read()
        except (BotoCoreError, HTTPError, OSError) as e:
            raise translate(e, f"{what} in {self.place}", reached=True) from e
        return content

    def _put_if_absent(self, key: str, data: memoryview, extra: dict[str, Any]) -> None:
        there = f"{key} exists in {self.place}"
        if not self._conditional:
            # The service may pass over the condition, or look too early: see `conditional`.
            with suppress(ObjectNotFound):
                self.stat(key)
                raise ObjectExists(there)
        try:
            self.uploader.put(key, data, IfNoneMatch="*", **extra)
        except StorageError as e:
            status, code = status_of(e.__cause__), code_of(e.__cause__)
            if status == 412:
                raise ObjectExists(there) from e
            if code not in _WITHOUT_CONDITIONS:
                raise
            self.uploader.put(key, data, **extra)

    def _has_conditional_put(self) -> bool:
        """Whether conditional puts are atomic here, found out once."""
        with self._probing:
            if self._conditional is None:
                key = _PROBE + secrets.token_hex(8)

                def put(body: Any) -> bool:
                    try:
                        self.uploader.put_body(key, body, IfNoneMatch="*")
                    except StorageError as e:
                        if status_of(e.__cause__) == 412 or code_of(e.__cause__) == "ConditionalRequestConflict":
                            return False
                        raise
                    return True

                try:
                    self._conditional = overlapping_puts_exclude_each_other(self.connection.client(), put)
                except StorageError as e:
                    if code_of(e.__cause__) not in _WITHOUT_CONDITIONS:
                        raise
                    self._conditional = False
                finally:
                    with suppress(StorageError):
                        self.delete(key)
            return self._conditional

    def _sweep_once(self) -> None:
        with self._lock:
            if self._swept:
                return
            self._swept = True
        # Without the permission for it a rule of the bucket has to do it; see the documentation.
        with suppress(StorageError):
            self.uploader.abort_stale()

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, "vmsnap-s3")
            return self._threads
