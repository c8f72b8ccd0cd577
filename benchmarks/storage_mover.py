"""Moves objects between files and a storage, as a process of its own: by a backend of vmsnap as a backup and a restore
do it, or by boto3's own transfer manager.

    python -m benchmarks.storage_mover vmsnap|boto3 put|get URL FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsnap.roles.storage import ObjectInfo

# As many packs as an uploader stores at once, and as many ranges as a restore reads at once.
_PUTS = 4
_GETS = min(len(os.sched_getaffinity(0)), 8) + 4
_RANGE_BYTES = 8 << 20
# As the others write their files. Larger writes get memory that the machine has not used yet, and wait for it.
_WRITE_BYTES = 256 << 10


def main() -> None:
    """Move everything; see the module."""
    tool, direction, url, name = sys.argv[1:]
    folder = Path(name)
    moves: dict[tuple[str, str], Callable[[str, Path], None]] = {
        ("vmsnap", "put"): _put,
        ("vmsnap", "get"): _get,
        ("boto3", "put"): _boto3_put,
        ("boto3", "get"): _boto3_get,
    }
    moves[tool, direction](url, folder)


def _put(url: str, folder: Path) -> None:
    from vmsnap.places import storage_for

    storage = storage_for(url)

    def move(file: Path) -> None:
        storage.put(f"packs/{file.name}", file.read_bytes())

    with ThreadPoolExecutor(_PUTS) as threads:
        list(threads.map(move, sorted(folder.iterdir())))
    storage.close()


def _get(url: str, folder: Path) -> None:
    from vmsnap.places import storage_for

    storage = storage_for(url)

    def move(found: ObjectInfo) -> None:
        with (folder / found.key.rpartition("/")[2]).open("wb") as file:
            for at in range(0, found.size_bytes, _RANGE_BYTES):
                content = memoryview(storage.get(found.key, at, min(_RANGE_BYTES, found.size_bytes - at)))
                for start in range(0, len(content), _WRITE_BYTES):
                    file.write(content[start : start + _WRITE_BYTES])

    with ThreadPoolExecutor(_GETS) as threads:
        list(threads.map(move, storage.list("packs/")))
    storage.close()


def _boto3_put(url: str, folder: Path) -> None:
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for file in sorted(folder.iterdir()):
        client.upload_file(str(file), bucket, f"{prefix}/packs/{file.name}")


def _boto3_get(url: str, folder: Path) -> None:
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for found in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/packs/")["Contents"]:
        client.download_file(bucket, found["Key"], str(folder / found["Key"].rpartition("/")[2]))


if __name__ == "__main__":
    main()
