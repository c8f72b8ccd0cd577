"""How fast a migration stream becomes RAM images, and back.

Usage::

    python benchmarks/stream.py [--ram-mib 1024] [--folder /dev/shm] [--pipe]

Makes a stream of one block of RAM for each mix of pages, parses it with ``MigrationStreamReader`` from a file, or with
``--pipe`` from a pipe that another process fills, and writes it again with ``write_stream``. Stream, images and result
are on the tmpfs ``--folder``, which needs three times the RAM. The best of three runs counts.

On a 2-core Xeon VM with nothing else to do (parse from a file and from a pipe, write to a file; GB/s)::

    mix                   stream    RAM    by pipe: stream    write: RAM
    pages only               1.9    1.9                1.4           1.6
    zeros only               0.25   110                0.25          900
    long runs (1-2000)       1.7    3.4                1.5           3.1
    short runs (1-10)        1.4    2.8                1.3           2.4
    alternating              1.1    2.2                1.0           1.6
    1 page in 20             0.2    3.3                0.3           9.2
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmsnap_drivers.qemu.stream import MigrationStreamReader
from vmsnap_drivers.qemu.synthesis import write_stream

PAGE_BYTES = 4096
Mask = npt.NDArray[np.bool_]

DESCRIPTION = b'{"page_size": 4096, "devices": []}'
DEVICE_STATE = b"\0\6" + len(DESCRIPTION).to_bytes(4, "big") + DESCRIPTION


def random_runs(longest: int) -> Callable[[int], Mask]:
    """A mix of runs of pages and of zero pages, each of a random length from 1 to ``longest``."""

    def mix(page_count: int) -> Mask:
        lengths = np.random.default_rng(1).integers(1, longest + 1, page_count)
        return np.repeat(np.arange(page_count) % 2 == 0, lengths)[:page_count]

    return mix


MIXES: dict[str, Callable[[int], Mask]] = {
    "pages only": lambda n: np.ones(n, np.bool_),
    "zeros only": lambda n: np.zeros(n, np.bool_),
    "long runs (1-2000)": random_runs(2000),
    "short runs (1-10)": random_runs(10),
    "alternating": random_runs(1),
    "1 page in 20": lambda n: np.random.default_rng(1).random(n) < 0.05,
}


def records(holds_page: Mask) -> Iterator[bytes]:
    """Page records, in pieces; the first one names the block."""
    page = np.random.default_rng(2).bytes(PAGE_BYTES)
    yield (0x08 if holds_page[0] else 0x02).to_bytes(8, "big") + b"\6pc.ram" + (page if holds_page[0] else b"\0")
    for begin in range(1, len(holds_page), 512):
        yield b"".join(
            (number * PAGE_BYTES | (0x28 if has_page else 0x22)).to_bytes(8, "big") + (page if has_page else b"\0")
            for number, has_page in enumerate(holds_page[begin : begin + 512].tolist(), begin)
        )


def make_stream(path: Path, holds_page: Mask) -> None:
    """Write a whole stream with one block ``pc.ram``."""
    ram_bytes = len(holds_page) * PAGE_BYTES
    end = (0x10).to_bytes(8, "big") + b"\x7e\0\0\0\2"
    with path.open("wb") as out:
        out.write(b"QEVM\0\0\0\3\7\0\0\0\2pc\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4")
        out.write((ram_bytes | 4).to_bytes(8, "big") + b"\6pc.ram" + ram_bytes.to_bytes(8, "big") + end)
        out.write(b"\3\0\0\0\2")
        out.writelines(records(holds_page))
        out.write(end + DEVICE_STATE)


def measure(stream: Path, folder: Path, by_pipe: bool) -> tuple[float, float]:
    """Parse the stream, write it again; seconds for each."""
    images = folder / "images"
    images.mkdir()
    try:
        if by_pipe:
            with subprocess.Popen(["cat", stream], stdout=subprocess.PIPE) as cat:
                assert cat.stdout is not None
                begin = time.perf_counter()
                captured = MigrationStreamReader(cat.stdout.fileno(), images).run()
                parsed_seconds = time.perf_counter() - begin
        else:
            with stream.open("rb", buffering=0) as source:
                begin = time.perf_counter()
                captured = MigrationStreamReader(source.fileno(), images).run()
                parsed_seconds = time.perf_counter() - begin
        with (images / "again").open("wb", buffering=0) as out:
            begin = time.perf_counter()
            write_stream(out.fileno(), captured, images)
            written_seconds = time.perf_counter() - begin
    finally:
        shutil.rmtree(images)
    return parsed_seconds, written_seconds


def main() -> None:
    """Measure all mixes and print a table."""
    parser = argparse.ArgumentParser(description="How fast a migration stream becomes RAM images, and back.")
    parser.add_argument("--ram-mib", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--pipe", action="store_true", help="read from a pipe instead of a file")
    parser.add_argument("--mix", choices=MIXES, help="only this mix")
    options = parser.parse_args()
    page_count = options.ram_mib * 1024 * 1024 // PAGE_BYTES
    print(f"{'mix':<20} {'stream MB':>9}   {'parse: GB/s of stream':>21} {'of RAM':>7}   {'write: of RAM':>13}")
    for name, mix in MIXES.items():
        if options.mix not in (None, name):
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as folder_name:
            folder = Path(folder_name)
            stream = folder / "stream"
            make_stream(stream, mix(page_count))
            stream_bytes = stream.stat().st_size
            runs = [measure(stream, folder, options.pipe) for _ in range(3)]
        parsed, written = (min(seconds) for seconds in zip(*runs, strict=True))
        ram_bytes = page_count * PAGE_BYTES
        print(
            f"{name:<20} {stream_bytes / 1e6:>9.1f}   {stream_bytes / parsed / 1e9:>21.2f}"
            f" {ram_bytes / parsed / 1e9:>7.2f}   {ram_bytes / written / 1e9:>13.2f}"
        )


if __name__ == "__main__":
    main()
