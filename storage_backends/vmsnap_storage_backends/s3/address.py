"""``s3://bucket/prefix`` and the options: where objects lie, and how. No I/O, and no boto3."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from vmsnap.errors import UsageError
from vmsnap.roles import PATH, Option, number, seconds, with_defaults

# Amazon's own rules are narrower (3 to 63 characters, lower case); other services keep to older ones.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_MAX_PREFIX_BYTES = 800  # a key has 1024 at most, ours 200 of them
_SHAPE = "write s3://bucket or s3://bucket/prefix; endpoint and credentials are found as boto3 finds them"
_DAY_SECONDS = 86400.0
_TIMEOUT = seconds(86400)
# The protocol allows 100 years.
_DAYS = number(36500, "days", "DAYS")

OPTIONS: Sequence[Option] = (
    Option("endpoint", "URL of the service, such as https://s3.example.com; else AWS_ENDPOINT_URL, or Amazon's own."),
    Option("region", "Region of the bucket; else as boto3 finds it."),
    Option("profile", "Profile in the configuration and credentials files of AWS."),
    Option(
        "addressing",
        "Whether the bucket stands in the path or in the host name.",
        default="auto",
        choices=("auto", "path", "virtual"),
    ),
    Option("storage_class", "Storage class of packs, such as STANDARD_IA; all else is small and read often."),
    Option("ca_bundle", "File with the certificates that the service's own is checked against.", type=PATH),
    Option("timeout", "After how long a service that says nothing is taken for gone.", "60", type=_TIMEOUT),
    Option(
        "object_lock",
        "Keep what a backup needs from being deleted by anybody: with governance nobody without a special permission"
        " can, with compliance nobody at all. The bucket must have object lock enabled.",
        default="none",
        choices=("none", "governance", "compliance"),
    ),
    Option("object_lock_days", "For how long from the newest backup that needs it.", type=_DAYS),
)


@dataclass(frozen=True)
class Place:
    """A bucket, and what stands before each key in it: empty, or ending with a slash."""

    bucket: str
    prefix: str

    def full(self, key: str) -> str:
        """The key in the bucket."""
        return self.prefix + key

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True)
class Settings:
    """The options, understood. None where boto3 is to find it. `lock_mode`: as the protocol has it, None: no lock."""

    endpoint: str | None
    region: str | None
    profile: str | None
    addressing: str
    storage_class: str | None
    ca_bundle: str | None
    timeout_seconds: float
    lock_mode: str | None
    lock_seconds: float | None


def parse_place(url: str) -> Place:
    """The place that a URL names. What may hold a secret is refused without being shown.

    :raises UsageError: it names none
    """
    rest = url.removeprefix("s3://")
    bucket, _, path = rest.partition("/")
    if rest == url or any(character in bucket for character in "@:") or any(character in rest for character in "?#"):
        raise UsageError("the s3 URL of the repository has something else in it than bucket and prefix", cure=_SHAPE)
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{url!r} has no valid bucket name", cure=_SHAPE)
    words = [word for word in path.split("/") if word]
    if any(word in (".", "..") or not word.isprintable() for word in words):
        raise UsageError(f"{url!r} has no valid prefix", cure=_SHAPE)
    prefix = "".join(f"{word}/" for word in words)
    if len(prefix.encode()) > _MAX_PREFIX_BYTES:
        raise UsageError("the prefix of the s3 URL is too long", cure=_SHAPE)
    return Place(bucket, prefix)


def parse_settings(options: Mapping[str, str]) -> Settings:
    """The settings that the options mean.

    :raises UsageError: a value that cannot be, or two that do not go together
    """
    mode = options.get("object_lock", "none")
    days = options.get("object_lock_days")
    if (mode == "none") != (days is None):
        raise UsageError(
            "object_lock and object_lock_days go together", cure="give both, such as object_lock=compliance, 30 days"
        )
    return Settings(
        endpoint=_endpoint(options.get("endpoint")),
        region=options.get("region"),
        profile=options.get("profile"),
        addressing=options.get("addressing", "auto"),
        storage_class=options.get("storage_class"),
        ca_bundle=options.get("ca_bundle"),
        timeout_seconds=_TIMEOUT.read(with_defaults(OPTIONS, options)["timeout"], "timeout"),
        lock_mode=None if mode == "none" else mode.upper(),
        lock_seconds=None if days is None else _DAY_SECONDS * _DAYS.read(days, "object_lock_days"),
    )


def refuse_secrets_in_endpoint(endpoint: str) -> None:
    """Refuse an endpoint with a user or a password in it, without showing it.

    :raises UsageError: it has
    """
    if "@" in endpoint:
        raise UsageError("the endpoint of s3 has a user or password in it", cure="give https://host:port alone")


def _endpoint(text: str | None) -> str | None:
    if text is None:
        return None
    refuse_secrets_in_endpoint(text)
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"endpoint={text!r} is no URL of a service", cure="write it as https://s3.example.com")
    return text.rstrip("/")
