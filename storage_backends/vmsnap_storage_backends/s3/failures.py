"""What a failure of boto3, or an error of the service, means: gone for the moment, or for good and with which cure.

Codes are those of "List of error codes" in the Amazon S3 API Reference; other services use the same, or the status
alone.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from vmsnap.errors import ObjectNotFound, StorageError, StorageFull, TransientStorageError, UsageError, VmsnapError

_OVERLOADED = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "TooManyRequestsException",
    "BandwidthLimitExceeded",
    "ServiceUnavailable",
    "Busy",
}
_MOMENTARY = {
    "InternalError",
    "InternalServerError",
    "RequestTimeout",
    "RequestTimeoutException",
    "OperationAborted",
    "ConditionalRequestConflict",
    # Damaged on the way: the server has looked at the check sum and refused it.
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
}
CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "InvalidToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "AuthFailure",
}
"""Codes after which other credentials may help."""
_FULL = {"QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "XMinioStorageFull", "StorageFull"}
_CURES = {
    "NoSuchBucket": "check the name, or make it: aws s3 mb s3://BUCKET",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, AWS_PROFILE and the credentials file",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY and the credentials file",
    "ExpiredToken": "get new credentials; those here have run out",
    "AccessDenied": "give these credentials the permission; docs/storage.md lists what vmsnap needs",
    "AllAccessDisabled": "ask who owns the bucket",
    "InvalidObjectState": "it was moved to an archive: restore it there first, and take packs out of that rule",
    "AuthorizationHeaderMalformed": "give the region of the bucket: -o region=NAME",
    "PermanentRedirect": "give the region of the bucket: -o region=NAME, or another endpoint",
    "InvalidStorageClass": "choose a storage_class that the service has",
    "NotImplemented": "the service lacks this part of the protocol",
}


def code_of(error: BaseException | None) -> str:
    """The service's code for an error; its status where it gave no code, empty where the service said nothing."""
    response: Any = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def status_of(error: BaseException | None) -> int:
    """The HTTP status of an error; 0 where the service said nothing."""
    response: Any = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def translate(error: BaseException, what: str, *, reached: bool) -> VmsnapError:
    """Our error for one of boto3's.

    :param what: what was being done, as in "cannot `what`"
    :param reached: the service has answered before, and is there again some time; else it may be another one that was
        meant, and nobody should wait for it
    """
    from botocore.exceptions import (
        ClientError,
        ConnectTimeoutError,
        CredentialRetrievalError,
        EndpointConnectionError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        SSLError,
        TokenRetrievalError,
    )

    what = f"cannot {what}"
    if isinstance(error, ClientError):
        return _of_service(error, what)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | TokenRetrievalError):
        return StorageError(f"{what}: {_text(error)}", cure="renew the credentials, or see -o profile of vmsnap-s3")
    if isinstance(error, ParamValidationError):
        return UsageError(f"{what}: {_text(error)}")
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes) or (
        isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
    ):
        return StorageError(
            f"{what}: the certificate of the service is not trusted: {_certificate(causes)}",
            cure="give its certificate authority: -o ca_bundle=FILE, or AWS_CA_BUNDLE; or check the endpoint",
        )
    if isinstance(error, EndpointConnectionError) and not isinstance(error, ConnectTimeoutError) and not reached:
        return StorageError(f"{what}: {_unreached(causes, error)}", cure="check the endpoint and the network")
    # Whatever else: connections that were cut, time-outs, answers that came short or made no sense.
    return TransientStorageError(f"{what}: {_text(error)}", cure="see whether the service is there")


def _of_service(error: Any, what: str) -> VmsnapError:
    code, status = code_of(error), status_of(error)
    said = str(error.response.get("Error", {}).get("Message", "")).strip(" .")
    text = " ".join(f"{what}: {said or 'the service refused it'} ({code or status})".split())
    if code in _OVERLOADED or status in (429, 503):
        return TransientStorageError(text, overloaded=True)
    if code in ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"):
        return StorageError(
            f"{what}: {_skew(error)}", cure="set this host's clock, and let NTP keep it (timedatectl shows it)"
        )
    if code in _FULL or status == 507:
        return StorageFull(text, cure="free some room, or raise the quota")
    if code in _MOMENTARY or (status >= 500 and code != "NotImplemented"):
        return TransientStorageError(text)
    if code in ("NoSuchKey", "NoSuchVersion"):
        return ObjectNotFound(text)
    if code in CREDENTIALS:
        return StorageError(text, cure=_CURES.get(code, _CURES["ExpiredToken"]))
    # The answer to HEAD has no body, and so no code but the status.
    return StorageError(text, cure=_CURES.get(code, _CURES["AccessDenied"] if status == 403 else ""))


def _skew(error: Any) -> str:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        ahead = (datetime.now(UTC) - parsedate_to_datetime(headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return "the clocks of this host and of the service disagree"
    return f"this host's clock is {abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} the service's"


def _unreached(causes: list[BaseException], error: BaseException) -> str:
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return f"the name of the service is not resolved: {_text(error)}"
        if isinstance(cause, ConnectionRefusedError):
            return f"the service refuses the connection, nothing listens there: {_text(error)}"
    return _text(error)


def _certificate(causes: list[BaseException]) -> str:
    found = [cause.verify_message for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)]
    return found[0] if found else "it cannot be verified"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it: boto3 keeps the error of urllib3, which keeps that of the socket."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        kept: Any = getattr(one, "kwargs", {})
        waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
        waiting += [kept.get("error")] if isinstance(kept, dict) else []


def _text(error: BaseException) -> str:
    # Without what stands behind the path of a URL, which tells nobody anything.
    return re.sub(r'\?[^\s"]*', "", " ".join(str(error).split())).rstrip(".")
