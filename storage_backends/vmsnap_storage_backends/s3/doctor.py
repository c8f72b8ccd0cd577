"""Says precisely what keeps a bucket from being used. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vmsnap.errors import StorageError, VmsnapError
from vmsnap.model import Finding

if TYPE_CHECKING:
    from vmsnap_storage_backends.s3.backend import S3Storage

_OURS = {"config", "keys/", "packs/", "index/", "manifests/", "sessions/", "garbage/"}
_OTHERS = {
    "snapshots/": "restic",
    "locks/": "restic",
    "kopia.repository": "Kopia",
    "chunks/": "Duplicacy",
    "duplicati": "Duplicati",
}


def examine(storage: S3Storage) -> Sequence[Finding]:
    """See `StorageBackend.doctor`."""
    subject = f"bucket {storage.place.bucket}"
    findings = []
    try:
        for finding in _examine(storage, subject):
            findings.append(finding)
    except VmsnapError as e:
        findings.append(Finding(subject, "missing", e.message, e.cure))
    return findings


def _examine(storage: S3Storage, subject: str) -> Iterator[Finding]:
    place = storage.place
    page = storage.call("list", "list_objects_v2", Bucket=place.bucket, Prefix=place.prefix, Delimiter="/", MaxKeys=100)
    endpoint = storage.connection.client().meta.endpoint_url
    yield Finding(subject, "ok", f"is there and can be listed, at {endpoint}")
    if endpoint.startswith("http:"):
        yield Finding(
            subject, "note", "is reached without TLS: object names and sizes can be seen, and answers changed", "https"
        )
    yield _contents(storage, page)
    yield from _writing(storage, subject)
    yield from _leftovers(storage, subject)
    yield from _locks(storage, subject)


def _contents(storage: S3Storage, page: dict[str, list[dict[str, str]]]) -> Finding:
    subject = str(storage.place)
    names = [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    names += [entry["Key"] for entry in page.get("Contents", ())]
    found = {name.removeprefix(storage.place.prefix) for name in names} - {""}
    foreign = sorted(name for name in found - _OURS if not name.startswith("probe-"))
    if foreign:
        tools = sorted({tool for name in foreign for mark, tool in _OTHERS.items() if name.startswith(mark)})
        whose = f"is in use by {' or '.join(tools)}" if tools else "holds what is not vmsnap's"
        return Finding(subject, "missing", f"{whose}: {foreign[0]}", "choose another bucket or prefix")
    if "config" in found:
        return Finding(subject, "ok", "holds a repository")
    return Finding(subject, "note", "holds no repository yet", "vmsnap init makes one")


def _writing(storage: S3Storage, subject: str) -> Iterator[Finding]:
    # An upload in parts that is begun and given up leaves nothing, and shows whether this user may write.
    where = {"Bucket": storage.place.bucket, "Key": storage.place.full("probe-of-doctor")}
    try:
        upload = storage.call("write", "create_multipart_upload", **where)["UploadId"]
    except StorageError as e:
        yield Finding(subject, "missing", f"cannot be written to: {e.message}", e.cure)
        return
    try:
        storage.call("give up an upload", "abort_multipart_upload", **where, UploadId=upload)
    except StorageError as e:
        yield Finding(subject, "note", f"lets nobody give up unfinished uploads: {e.message}", "a lifecycle rule can")
    yield Finding(subject, "ok", "can be written to")


def _leftovers(storage: S3Storage, subject: str) -> Iterator[Finding]:
    with suppress(StorageError):  # without this permission nothing else is missing
        count = sum(1 for _ in storage.uploader.stale())
        if count:
            yield Finding(
                subject,
                "note",
                f"has {count} unfinished uploads older than a day",
                "the next backup removes them; a lifecycle rule (AbortIncompleteMultipartUpload) does so too",
            )


def _locks(storage: S3Storage, subject: str) -> Iterator[Finding]:
    if not storage.settings.lock_mode:
        return
    if not storage.retention.is_enabled():
        yield Finding(subject, "missing", "has no object lock, and object_lock is set", "make a bucket that has it")
        return
    days = (storage.settings.lock_seconds or 0) / 86400
    yield Finding(subject, "ok", f"locks what backups need for {days:g} days ({storage.settings.lock_mode.lower()})")
    if storage.retention.has_default():
        yield Finding(
            subject,
            "note",
            "locks every object by itself, short-lived ones too",
            "take the bucket's default retention away: vmsnap locks what backups need",
        )
