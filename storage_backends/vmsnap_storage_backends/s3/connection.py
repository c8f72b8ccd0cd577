"""A client of boto3, made when it is first needed and made anew when its credentials have run out."""

from __future__ import annotations

import threading
from typing import Any

from vmsnap.errors import DriverUnavailable, StorageError, UsageError
from vmsnap_storage_backends.s3.address import Settings, refuse_secrets_in_endpoint

_CONNECT_SECONDS = 10.0
# As many as all threads of a backup or a restore use at once.
_CONNECTIONS = 32


def import_boto3() -> Any:
    """boto3, which is imported here alone and only when s3 is used.

    :raises DriverUnavailable: it is not installed
    """
    try:
        import boto3.session
    except ModuleNotFoundError as e:
        raise DriverUnavailable(
            f"storage backend 's3' needs {e.name}, which is not installed", cure="install it: pip install 'vmsnap[s3]'"
        ) from e
    return boto3


class Connection:
    """The client; may be used by several threads, as clients of boto3 may."""

    def __init__(self, settings: Settings) -> None:
        """No I/O."""
        self._settings = settings
        self._lock = threading.Lock()
        self._client: Any = None
        self._credentials: tuple[str, ...] = ()
        self.reached = False
        """Whether the service has ever answered: one that has is waited for when it is away."""

    def client(self) -> Any:
        """The client.

        :raises DriverUnavailable: boto3 is not installed
        :raises UsageError: the profile or another setting does not exist
        :raises StorageError: there are no credentials
        """
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def renew(self, refused: Any) -> bool:
        """Look for credentials anew, since the service has refused those of the client `refused`; False where there
        are no other ones.
        """
        with self._lock:
            if self._client is not refused:
                return True  # another thread has done it
            before = self._credentials
            self._client = self._connect()
            return self._credentials != before

    def close(self) -> None:
        """Close its connections; idempotent."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connect(self) -> Any:
        boto3 = import_boto3()
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        settings = self._settings
        config = Config(
            connect_timeout=min(settings.timeout_seconds, _CONNECT_SECONDS),
            read_timeout=settings.timeout_seconds,
            max_pool_connections=_CONNECTIONS,
            # vmsnap tries again itself, in one place for all backends.
            retries={"total_max_attempts": 1, "mode": "standard"},
            # Whoever checks signatures of version 4 checks the SHA-256 of the payload that they cover, over https too
            # where boto3 would leave it out; the newer check sums not every service knows.
            signature_version="s3v4",
            s3={"addressing_style": settings.addressing, "payload_signing_enabled": True},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            tcp_keepalive=True,
        )
        try:
            # A session of our own: the default one keeps credentials, and is not for several threads.
            session = boto3.session.Session(profile_name=settings.profile, region_name=settings.region)
            credentials = session.get_credentials()
            if credentials is None:
                raise StorageError(
                    "no credentials for s3 were found",
                    cure="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or -o profile=NAME",
                )
            client = session.client(
                "s3",
                endpoint_url=settings.endpoint,
                verify=settings.ca_bundle,
                config=config,
            )
            frozen = credentials.get_frozen_credentials()
        except BotoCoreError as e:
            raise UsageError(f"s3 cannot be set up so: {_one_line(e)}", cure="see -o of vmsnap-s3, and ~/.aws") from e
        except ValueError as e:  # of an endpoint in the environment; it may hold anything, and is not shown
            raise UsageError("the endpoint of s3 is no URL of a service", cure="see AWS_ENDPOINT_URL") from e
        refuse_secrets_in_endpoint(client.meta.endpoint_url)
        self._credentials = tuple(str(part) for part in frozen)
        return client


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
