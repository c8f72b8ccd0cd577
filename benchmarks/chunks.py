"""Which chunk sizes, and which level of zstd: the study behind the defaults.

    python -m benchmarks.chunks [--gib 3] [--memory-mib 1024] [--keep FOLDER] [--folder /var/tmp] [--docs]

Disks: the image of the comparison with restic and borg, stored, stored again unchanged, and with 1 % of its 64 KiB
blocks changed. RAM: three images of a working guest, some seconds apart (tests/lab/install.sh gets what the guest
needs), then the last one with 1 % of its pages changed at random places. With ``--keep`` the images are left in that
folder, and taken from there next time. With ``--docs`` the tables go into docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chunk_measure import PAGE_BYTES, Measured, Pages, change_scattered, compare_pages, measure
from benchmarks.disk_image import copy_changed, make_image
from benchmarks.document import host, markdown_table, replace_section
from benchmarks.ram_guest import capture_images
from vmsnap.repository import ImageKind
from vmsnap.repository.format import ChunkSizes

_DISK_SIZES = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1024 << 10]
_RAM_SIZES = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10]
_LEVELS = [-1, 1, 2, 3]
_INDEX_ROW_BYTES = 49
"""What the index takes in memory for each chunk."""


def main() -> int:
    """Measure, print, write."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="vmsnap-study-", dir=options.folder) as name:
        folder = Path(name)
        kept = options.keep or folder
        kept.mkdir(parents=True, exist_ok=True)
        disks = _disks(kept, int(options.gib * 1024) << 20)
        disk_text = _disk_tables(disks, folder)
        rams = _rams(kept, options.memory_mib, options.apart)
        ram_text = _ram_tables(rams, folder)
    text = f"{host()}; encrypted; images in the page cache.\n\n{disk_text}\n\n{ram_text}"
    print(text)
    if options.docs:
        replace_section("chunks", text)
    return 0


def _disks(folder: Path, size_bytes: int) -> list[Path]:
    """The disk, unchanged, and changed."""
    first, second = folder / "disk1.img", folder / "disk2.img"
    if not second.exists():
        _say("making the disk images")
        make_image(first, size_bytes)
        copy_changed(first, second)
    return [first, first, second]


def _rams(folder: Path, memory_mib: int, apart_seconds: float) -> list[Path]:
    """Three images of the guest, and the scattered change."""
    images = [folder / f"ram{number}.img" for number in (1, 2, 3)]
    scattered = folder / "ram-scattered.img"
    if not scattered.exists():
        _say("booting the guest")
        with tempfile.TemporaryDirectory(prefix="vmsnap-ram-", dir=folder) as place:
            made = capture_images(
                Path(place), memory_mib=memory_mib, count=len(images), apart_seconds=apart_seconds, tell=_say
            )
            for path, image in zip(made, images, strict=True):
                shutil.move(path, image)
        change_scattered(images[-1], scattered)
    return [*images, scattered]


def _disk_tables(images: Sequence[Path], folder: Path) -> str:
    usual = ChunkSizes().disk
    sizes = [_measure(images, ImageKind.DISK, size, folder) for size in _DISK_SIZES]
    levels = [_measure(images, ImageKind.DISK, usual, folder, level) for level in _LEVELS]
    head = ["disk", "first: stored", "of it tree and index", "speed", "unchanged: speed", "1 % changed: added"]
    data_bytes = images[0].stat().st_blocks * 512
    rows = [
        [
            _named(one, usual),
            _mb(one.added[0].stored_bytes),
            _mb(one.added[0].tree_bytes + 2 * one.added[0].index_bytes),
            _speed(data_bytes, one.added[0].seconds),
            _speed(data_bytes, one.added[1].seconds),
            _mb(one.added[2].stored_bytes),
        ]
        for one in sizes + levels
    ]
    memory = [[_named(one, usual), f"{(1 << 40) // one.chunk_bytes * _INDEX_ROW_BYTES >> 20} MiB"] for one in sizes]
    return "\n\n".join((markdown_table(head, rows), markdown_table(["disk", "index in memory per TiB"], memory)))


def _ram_tables(images: Sequence[Path], folder: Path) -> str:
    usual = ChunkSizes().ram
    sizes = [_measure(images, ImageKind.RAM, size, folder) for size in _RAM_SIZES]
    levels = [_measure(images, ImageKind.RAM, usual, folder, level) for level in _LEVELS]
    changes = [compare_pages(before, after) for before, after in itertools.pairwise(images)]
    head = [
        "RAM", "first: stored", "of it tree and index", "speed", "second: added", "third: added", "scattered: added"
    ]  # fmt: skip
    data_bytes = images[0].stat().st_blocks * 512
    rows = [
        [
            _named(one, usual),
            _mb(one.added[0].stored_bytes),
            _mb(one.added[0].tree_bytes + 2 * one.added[0].index_bytes),
            _speed(data_bytes, one.added[0].seconds),
            *(_mb(added.stored_bytes) for added in one.added[1:]),
        ]
        for one in sizes + levels
    ]
    names = ("second", "third", "scattered")
    pages = [_pages_row(name, change) for name, change in zip(names, changes, strict=True)]
    pages_head = ["RAM image", "pages that are not zero", "changed since the one before", "each of these packed"]
    chosen = next(one for one in sizes if one.chunk_bytes == usual)
    said = " ".join(
        f"The {name} image has {change.changed} changed pages, {_mb(change.changed * PAGE_BYTES)}, and adds "
        f"{_mb(added.stored_bytes)}: {added.stored_bytes / (change.changed * PAGE_BYTES):.0%} of their size, "
        f"{added.stored_bytes / change.packed_bytes:.1f} times what they take packed by themselves."
        for name, change, added in zip(names[:2], changes, chosen.added[1:], strict=False)
    )
    return "\n\n".join((markdown_table(pages_head, pages), markdown_table(head, rows), said))


def _measure(
    images: Sequence[Path], kind: ImageKind, chunk_bytes: int, folder: Path, level: int | None = None
) -> Measured:
    _say(f"{kind.value}: {chunk_bytes >> 10} KiB, level {level or 'as usual'}")
    return measure(images, kind, chunk_bytes, folder, level=level)


def _pages_row(name: str, change: Pages) -> list[str]:
    changed = f"{change.changed} ({_mb(change.changed * PAGE_BYTES)})"
    return [name, f"{change.all_pages} ({_mb(change.all_pages * PAGE_BYTES)})", changed, _mb(change.packed_bytes)]


def _named(measured: Measured, usual: int) -> str:
    size = f"{measured.chunk_bytes >> 10} KiB"
    if measured.level is not None:
        return f"{size}, zstd {measured.level}"
    return f"**{size}**" if measured.chunk_bytes == usual else size


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


def _speed(size_bytes: int, seconds: float) -> str:
    return f"{size_bytes / seconds / 1e6:.0f} MB/s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chunks",
        description="Which chunk sizes, and which level of zstd.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--gib", type=float, default=3, help="the size of the disk")
    add("--memory-mib", type=int, default=1024, help="the guest's memory")
    add("--apart", type=float, default=20, metavar="SECONDS", help="between two images of it")
    add("--keep", type=Path, metavar="FOLDER", help="for the images, to be used again")
    add("--folder", type=Path, default=Path("/var/tmp"), help="for the repositories")
    add("--docs", action="store_true", help="write the tables into docs/performance.md")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
