"""Measures the repository on this machine: first backup, unchanged second backup, restore, check.

    python benchmarks/repository.py [--mib 1024] [--folder /var/tmp] [--passphrase x] [--profile]

The data is a disk image with a third holes, a third files of this system, a third random bytes. Speeds are bytes of
the image without its holes, per second; the source is in the page cache, the repository is fsynced.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vmsnap.repository import BackupFields, DiskImage, ImageKind, Manifest, Repository, SparseFileReader
from vmsnap_storage_backends.local import LocalStorage


def system_files() -> Iterator[bytes]:
    """Contents of this system's programs and libraries, endlessly."""
    while True:
        for folder in ("/usr/bin", "/usr/lib"):
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and not path.is_symlink() and path.stat().st_size > 4096:
                    yield path.read_bytes()


def make_image(path: Path, size: int) -> int:
    """Write the image, in stripes of 16 MiB; returns the bytes that are no holes."""
    files = system_files()
    stripe = 16 << 20
    rest = b""
    data = 0
    with path.open("wb") as image:
        for at in range(0, size, 3 * stripe):
            while len(rest) < stripe:
                rest += next(files)
            image.seek(at + stripe)
            image.write(rest[:stripe])
            image.write(os.urandom(stripe))
            rest = rest[stripe:]
            data += 2 * stripe
        image.truncate(max(size, image.tell()))
    return data


def timed(what: str, data: int, work: Callable[[], object]) -> None:
    """Run and print."""
    begin = time.monotonic()
    work()
    took = time.monotonic() - begin
    print(f"{what:<28} {took:7.2f} s {data / took / 1e6:8.0f} MB/s")


def back_up(repository: Repository, path: Path, kind: ImageKind) -> Manifest:
    """One backup of one image."""
    size = path.stat().st_size
    with repository.writer() as writer, SparseFileReader(path, size) as source:
        image = writer.add_image("disk vda", source, kind)
        disk = DiskImage("vda", size, "raw", str(path), "file", image)
        return writer.commit(BackupFields(vm="bench", hypervisor="none", mode="live", disks=(disk,)))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--folder", default="/var/tmp")
    parser.add_argument("--passphrase")
    parser.add_argument("--kind", choices=["disk", "ram"], default="disk")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    kind = ImageKind(options.kind)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        image = Path(folder, "image")
        data = make_image(image, options.mib << 20)
        storage = LocalStorage(str(Path(folder, "repository")))
        repository = Repository.create(storage, options.passphrase)
        print(f"{image.stat().st_size >> 20} MiB, {data >> 20} MiB of them data, {repository.encryption}, {kind.value}")
        profile = cProfile.Profile()
        if options.profile:
            profile.enable()
        timed("first backup", data, lambda: back_up(repository, image, kind))
        profile.disable()
        timed("second backup, unchanged", data, lambda: back_up(repository, image, kind))
        manifest = repository.list()[0]
        reader = repository.reader(manifest.disks[0].image)
        timed("restore", data, lambda: reader.restore_to_file(Path(folder, "restored")))
        timed("check --read-data", data, lambda: repository.check(read_data=True).raise_if_damaged())
        stored = sum(info.size_bytes for info in storage.list())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"stored {stored / data:.3f} of the data; peak memory {peak} MiB")
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
