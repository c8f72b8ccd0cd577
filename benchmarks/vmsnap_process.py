"""One backup or restore of one disk image as a process of its own, as the other tools are run.

    python -m benchmarks.vmsnap_process init|plain|backup|restore REPOSITORY [IMAGE] [--changed FILE]

The passphrase is in the environment, as VMSNAP_BENCH_PASSPHRASE. `backup` prints what it stored, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from vmsnap.model import Extent
from vmsnap.repository import BackupFields, DiskImage, ImageKind, Repository, SparseFileReader
from vmsnap_storage_backends.local import LocalStorage

PASSPHRASE_VARIABLE = "VMSNAP_BENCH_PASSPHRASE"


def main() -> int:
    """Do it."""
    parser = argparse.ArgumentParser(description="One step of a benchmark.")
    parser.add_argument("step", choices=["init", "plain", "backup", "restore"])
    parser.add_argument("repository")
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--changed", type=Path, help="JSON: pairs of offset and length, all that has changed")
    options = parser.parse_args()
    storage = LocalStorage(options.repository)
    if options.step == "plain":
        Repository.create(storage)
        return 0
    passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    if options.step == "init":
        Repository.create(storage, passphrase)
        return 0
    repository = Repository.open(storage, passphrase)
    if options.step == "restore":
        disk = repository.list()[-1].disks[0]
        repository.reader(disk.image).restore_to_file(options.image)
    else:
        print(json.dumps(back_up(repository, options.image, options.changed)))
    return 0


def back_up(repository: Repository, image: Path, changed: Path | None) -> dict[str, object]:
    """Store the image as the newest state of the disk whose states the repository has; returns what it took."""
    from vmsnap.repository.base import BaseImage

    extents = [Extent(*pair) for pair in json.loads(changed.read_text())] if changed else None
    earlier = repository.list()
    base = BaseImage(earlier[-1].disks[0].image, extents) if earlier else None
    size_bytes = image.stat().st_size
    with repository.writer() as writer, SparseFileReader(image, size_bytes) as source:
        record = writer.add_image("disk vda", source, ImageKind.DISK, base=base)
        disk = DiskImage("vda", size_bytes, "raw", str(image), "file", record)
        manifest = writer.commit(BackupFields(vm="bench", hypervisor="none", mode="live", disks=(disk,)))
        if writer.warnings:
            raise SystemExit(f"the backup warns: {writer.warnings}")
    return {"read_bytes": manifest.stats.read_bytes, "stored_bytes": manifest.stats.stored_bytes}


if __name__ == "__main__":
    sys.exit(main())
