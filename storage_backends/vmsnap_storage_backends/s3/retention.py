"""Object lock: objects that nobody can delete before a time, in a bucket whose objects all have versions.

See "Locking objects with Object Lock" in the Amazon S3 User Guide. A lock holds one version. Who deletes or replaces an
object without naming a version only hides the version that was there; it can be had back.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from vmsnap.errors import ObjectNotFound, ObjectRetained, StorageError
from vmsnap_storage_backends.s3.address import Place, Settings
from vmsnap_storage_backends.s3.failures import code_of

# Locks reach further than they must by this share of their length, so that not every backup has to lengthen them all.
_SLACK = 0.1


class Retention:
    """Locks, and deletes what is not locked. May be used by several threads."""

    def __init__(self, call: Callable[..., Any], place: Place, settings: Settings) -> None:
        self._call = call
        self._place = place
        self._settings = settings
        self._enabled = False

    def require(self) -> None:
        """See that the bucket can lock, where that is wanted.

        :raises StorageError: it cannot
        """
        if self._enabled or not self._settings.lock_mode:
            return
        if not self.is_enabled():
            raise StorageError(
                f"bucket {self._place.bucket} has no object lock, and object_lock is set",
                cure="make a bucket with object lock enabled, or take the option away",
            )
        self._enabled = True

    def is_enabled(self) -> bool:
        """Whether the bucket has object lock.

        :raises StorageError: the service does not say
        """
        try:
            found = self._configuration()
        except StorageError as e:
            if code_of(e.__cause__) in (
                "ObjectLockConfigurationNotFoundError",
                "NotImplemented",
                "MethodNotAllowed",
            ):
                return False
            raise
        return bool(found.get("ObjectLockEnabled") == "Enabled")

    def has_default(self) -> bool:
        """Whether the bucket locks every object by itself, those too that are to be deleted soon."""
        return self.is_enabled() and "Rule" in self._configuration()

    def retain(self, key: str, until: datetime) -> None:
        """Lock the object until then at least.

        :raises ObjectNotFound: there is none
        """
        now = datetime.now(UTC)
        there = self.locked_until(key)
        if there is not None and there >= until:
            return
        until += timedelta(seconds=(until - now).total_seconds() * _SLACK)
        self._call(
            f"lock {key}",
            "put_object_retention",
            key,
            Bucket=self._place.bucket,
            Key=self._place.full(key),
            Retention={"Mode": self._settings.lock_mode, "RetainUntilDate": until},
        )

    def locked_until(self, key: str, version: str | None = None) -> datetime | None:
        """Until when an object, or a version of it, is locked; None where it is not.

        :raises ObjectNotFound: there is none
        """
        which = {} if version is None else {"VersionId": version}
        found = self._call(
            f"look at {key}", "head_object", key, Bucket=self._place.bucket, Key=self._place.full(key), **which
        )
        until: datetime | None = found.get("ObjectLockRetainUntilDate")
        return until

    def locked_now(self, key: str) -> datetime | None:
        """Until when the object cannot be deleted; None where it can, or is not there."""
        try:
            until = self.locked_until(key)
        except ObjectNotFound:
            return None
        return until if until and until > datetime.now(UTC) else None

    def delete(self, key: str) -> None:
        """Delete all versions of an object, or none where one is locked.

        :raises ObjectRetained: one is locked
        """
        versions, markers = self._versions(key)
        for version in versions:
            try:
                until = self.locked_until(key, version)
            except ObjectNotFound:
                continue
            if until is not None and until > datetime.now(UTC):
                raise ObjectRetained(
                    f"{key} in {self._place} is locked until {until:%Y-%m-%d %H:%M} UTC",
                    until=until,
                    cure="it can be deleted after that",
                )
        for version in [*versions, *markers]:
            self._call(
                f"delete {key}",
                "delete_object",
                Bucket=self._place.bucket,
                Key=self._place.full(key),
                VersionId=version,
            )

    def _versions(self, key: str) -> tuple[list[str], list[str]]:
        """The versions of an object, and of the markers that hide it."""
        full = self._place.full(key)
        found: dict[str, list[str]] = {"Versions": [], "DeleteMarkers": []}
        markers: dict[str, str] = {}
        while True:
            page = self._call(
                f"list the versions of {key}",
                "list_object_versions",
                Bucket=self._place.bucket,
                Prefix=full,
                **markers,
            )
            beyond = False
            for kind, versions in found.items():
                for entry in page.get(kind, ()):
                    beyond |= entry["Key"] > full
                    if entry["Key"] == full:
                        versions.append(entry["VersionId"])
            if beyond or not page.get("IsTruncated"):
                return found["Versions"], found["DeleteMarkers"]
            markers = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}

    def _configuration(self) -> dict[str, Any]:
        answer = self._call("ask for object lock", "get_object_lock_configuration", Bucket=self._place.bucket)
        found: dict[str, Any] = answer.get("ObjectLockConfiguration", {})
        return found
