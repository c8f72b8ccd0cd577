"""The words of repository format 1: constants, object keys and geometry. docs/repository-format.md explains them."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from vmsnap.errors import UsageError

FORMAT_VERSION = 1
"""What this vmsnap writes, and the highest that it reads."""

ID_BYTES = 32
ZERO_ID = bytes(ID_BYTES)
"""The id that stands for a chunk, or a whole subtree, of zeros: a hole."""
TAG_BYTES = 16
"""What sealing adds to a blob."""
MAX_CHUNK_BYTES = 16 << 20
"""No blob is longer than this before compression; a longer one is damage or an attack."""
MIN_CHUNK_BYTES = 4096

CONFIG_KEY = "config"
KEYS_PREFIX = "keys/"
PACKS_PREFIX = "packs/"
INDEX_PREFIX = "index/"
MANIFESTS_PREFIX = "manifests/"
SESSIONS_PREFIX = "sessions/"
GARBAGE_PREFIX = "garbage/"

_HEX_ID = re.compile(r"[0-9a-f]{64}")


class BlobKind(enum.IntEnum):
    """What a blob is; each kind has ids of its own, so that no content of a guest can pass for a tree node."""

    DATA = 1
    TREE = 2


class Codec(enum.IntEnum):
    """How a blob's bytes are kept inside its seal."""

    RAW = 0
    ZSTD = 1


class ImageKind(enum.Enum):
    """What an image holds; decides its chunk size."""

    DISK = "disk"
    RAM = "ram"
    STATE = "state"


@dataclass(frozen=True)
class ChunkSizes:
    """Bytes per chunk for each kind of image, powers of two; and the ids per tree node.

    Chosen by measurement (docs/performance.md): small enough that scattered changes cost little, large enough that the
    index of a TiB fits into memory. The numbers are recorded per image: other ones only end deduplication between old
    and new backups.
    """

    disk: int = 128 << 10
    ram: int = 32 << 10
    state: int = 64 << 10
    fanout: int = 256

    def of(self, kind: ImageKind) -> int:
        """The chunk size of images of that kind."""
        return {ImageKind.DISK: self.disk, ImageKind.RAM: self.ram, ImageKind.STATE: self.state}[kind]

    def checked(self) -> ChunkSizes:
        """Return these sizes if they are possible ones.

        :raises UsageError: a size that is no power of two from `MIN_CHUNK_BYTES` to `MAX_CHUNK_BYTES`, or a fan-out
            that is none from 2 to 65536
        """
        for size in (self.disk, self.ram, self.state):
            if not is_chunk_size(size):
                raise UsageError(f"{size} is no chunk size", cure="use a power of two from 4 KiB to 16 MiB")
        if not is_fanout(self.fanout):
            raise UsageError(f"{self.fanout} is no fan-out", cure="use a power of two from 2 to 65536")
        return self


def is_chunk_size(size: int) -> bool:
    """Say whether chunks may have this many bytes."""
    return MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES and size & (size - 1) == 0


def is_fanout(fanout: int) -> bool:
    """Say whether tree nodes may have this many children."""
    return 2 <= fanout <= 1 << 16 and fanout & (fanout - 1) == 0


def chunk_count(size_bytes: int, chunk_bytes: int) -> int:
    """How many chunks an image has."""
    return -(-size_bytes // chunk_bytes)


def tree_depth(chunks: int, fanout: int) -> int:
    """How many levels of nodes stand over that many chunks; 1 at least."""
    depth = 1
    covered = fanout
    while covered < chunks:
        covered *= fanout
        depth += 1
    return depth


def pack_key(pack: bytes) -> str:
    """The object key of a pack."""
    name = pack.hex()
    return f"{PACKS_PREFIX}{name[:2]}/{name}"


def pack_of_key(key: str) -> bytes | None:
    """The pack that an object key names; None if it names none."""
    name = key.removeprefix(PACKS_PREFIX)[3:]
    if not _HEX_ID.fullmatch(name) or key != f"{PACKS_PREFIX}{name[:2]}/{name}":
        return None
    return bytes.fromhex(name)


def index_key(name: bytes) -> str:
    """The object key of an index object."""
    return INDEX_PREFIX + name.hex()


def is_index_key(key: str) -> bool:
    """Say whether an object of that key can be an index object of ours."""
    return key.startswith(INDEX_PREFIX) and bool(_HEX_ID.fullmatch(key.removeprefix(INDEX_PREFIX)))


def manifest_key(backup: str) -> str:
    """The object key of a backup's manifest. Keys are lower case; the manifest has the id as it is written."""
    return MANIFESTS_PREFIX + backup.lower()
