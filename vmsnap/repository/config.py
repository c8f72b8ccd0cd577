"""The objects that are readable text: JSON on the first line, its BLAKE3 hash on the second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from blake3 import blake3

from vmsnap.errors import DamageFound, RepositoryError, UsageError
from vmsnap.model import from_json, to_json
from vmsnap.repository.format import CONFIG_KEY, FORMAT_VERSION, ChunkSizes

ENCRYPTIONS = ("none", "aes256-gcm")

T = TypeVar("T")


@dataclass(frozen=True)
class RepositoryConfig:
    """The object ``config``, written once. `secret` (hex, 32 bytes) is there only without encryption: the root of the
    keys of ids and tags.
    """

    version: int
    repository: str
    encryption: str
    created: str
    chunker: str = "fixed"
    chunks: ChunkSizes = field(default_factory=ChunkSizes)
    secret: str | None = field(default=None, repr=False)

    @property
    def encrypted(self) -> bool:
        """Whether a passphrase is needed."""
        return self.encryption != "none"


@dataclass(frozen=True)
class _Versioned:
    version: int


def encode_text(value: object) -> bytes:
    """`value` as a line of JSON and a line with its hash."""
    line = to_json(value).encode()
    return line + b"\n" + blake3(line).hexdigest().encode() + b"\n"


def decode_text(data: bytes, kind: type[T], key: str) -> T:
    """The value that `encode_text` wrote under `key`.

    :raises DamageFound: it is not what was written
    :raises RepositoryError: a newer vmsnap wrote it
    """
    line, _, rest = data.partition(b"\n")
    intact = rest == blake3(line).hexdigest().encode() + b"\n"
    try:
        version = from_json(line, _Versioned).version
    except (ValueError, RecursionError) as e:
        raise DamageFound(f"{key} is damaged: not the text that vmsnap writes") from e
    if version > FORMAT_VERSION:
        doubt = "" if intact else ", unless it is damaged: its check sum is wrong"
        raise RepositoryError(
            f"{key} has format {version}, this vmsnap knows {FORMAT_VERSION} at most{doubt}", cure="install a newer one"
        )
    if not intact or version < 1:
        raise DamageFound(f"{key} is damaged: its check sum is wrong")
    try:
        return from_json(line, kind)
    except (ValueError, RecursionError) as e:
        raise DamageFound(f"{key} is damaged: {e}") from e


def decode_config(data: bytes) -> RepositoryConfig:
    """The repository's config.

    :raises DamageFound: it is not what was written, or impossible
    :raises RepositoryError: a newer vmsnap wrote it, or it uses what this one does not know
    """
    config = decode_text(data, RepositoryConfig, CONFIG_KEY)
    if config.encryption not in ENCRYPTIONS or config.chunker != "fixed":
        raise RepositoryError(
            f"the repository uses encryption {config.encryption!r} and chunker {config.chunker!r}, unknown here",
            cure="install a newer vmsnap",
        )
    try:
        config.chunks.checked()
        lengths = [len(bytes.fromhex(config.repository)), len(bytes.fromhex(config.secret or ""))]
    except (UsageError, ValueError) as e:
        raise DamageFound(f"{CONFIG_KEY} is damaged: {e}") from e
    if lengths != [16, 0 if config.encrypted else 32]:
        raise DamageFound(f"{CONFIG_KEY} is damaged: its id or secret has a wrong length")
    return config


def config_digest(data: bytes) -> bytes:
    """The hash of the config object, to which the passphrase keys are bound: a changed config opens with none."""
    return blake3(data, derive_key_context="vmsnap 2026-11-23 repository v1 digest of the config").digest()
