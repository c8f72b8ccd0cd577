"""Opens a repository by its URL: chooses the storage backend, asks for the passphrase only where one is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vmsnap import registry
from vmsnap.errors import UsageError
from vmsnap.roles import StorageBackend, check_options

if TYPE_CHECKING:
    from pathlib import Path

    from vmsnap.ratelimit import RateLimit
    from vmsnap.repository import Repository

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


def storage_for(
    url: str, options: Mapping[str, str] | None = None, limits: tuple[RateLimit, RateLimit] | None = None
) -> StorageBackend:
    """The storage backend for `url`; a plain path is a ``file`` URL. Calls to remote storage are tried again where that
    can help, see `vmsnap.retrying`.

    :param limits: on what goes there and on what comes from there
    :raises DriverUnavailable: no backend serves its scheme
    :raises UsageError: the URL or an option is wrong, or the URL holds a password
    """
    scheme = scheme_of(url)
    refuse_secrets(url)
    backend = registry.storage_backend(scheme)
    storage = backend(url, check_options(scheme, backend.options, options or {}))
    if limits:
        from vmsnap.ratelimit import LimitedStorage

        # Below the retries: what is moved again counts again.
        storage = LimitedStorage(storage, *limits)
    if not storage.remote:
        return storage
    from vmsnap.retrying import RetryingStorage

    return RetryingStorage(storage)


def scheme_of(url: str) -> str:
    """The scheme of a repository's URL, which names its storage backend; a plain path is a ``file`` URL."""
    found = _SCHEME.match(url)
    return found.group(1) if found else "file"


def refuse_secrets(url: str) -> None:
    """Refuse a URL with a password in it, without showing it: URLs are shown in messages, and remembered.

    :raises UsageError: there is one
    """
    authority = url.partition("://")[2].partition("/")[0] if scheme_of(url) != "file" else ""
    if ":" in authority.rpartition("@")[0]:
        raise UsageError(
            f"the {scheme_of(url)} URL of the repository has a password in it, which would be seen by others",
            cure="take it out of the URL, change it, and see the documentation of storage for where it belongs",
        )


def open_repository(
    url: str,
    passphrase: str | Callable[[], str] | None = None,
    options: Mapping[str, str] | None = None,
    *,
    cache_dir: Path | None = None,
    limits: tuple[RateLimit, RateLimit] | None = None,
) -> Repository:
    """Open the repository at `url`. `passphrase` may be a callable that is asked only if the repository is encrypted.

    :param cache_dir: below it the index of a remote repository is kept, so that it is not fetched each time; see
        `vmsnap.host.default_cache_dir`. None: nothing is kept
    :param limits: on what goes there and on what comes from there, see `vmsnap.ratelimit`
    :raises NotARepository: there is none
    :raises WrongPassphrase: it does not open
    """
    from vmsnap.repository import Repository

    return Repository.open(storage_for(url, options, limits), passphrase, cache_dir=cache_dir)


def create_repository(
    url: str,
    passphrase: str | None = None,
    *,
    encryption: str | None = None,
    options: Mapping[str, str] | None = None,
) -> Repository:
    """Make a repository at `url`, encrypted when a passphrase is given (or as `encryption` says: ``none``,
    ``aes256-gcm``).

    :raises AlreadyExists: there is one, or something else's files
    """
    from vmsnap.repository import Repository

    return Repository.create(storage_for(url, options), passphrase, encryption=encryption)
