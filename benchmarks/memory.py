"""How much memory backups of a huge sparse disk take, and how much its tree grows by a change.

    python -m benchmarks.memory [--tib 1] [--data-gib 20] [--folder /var/tmp] [--docs]

Needs twice the data in `--folder`. Each backup is a process of its own; memory is the kernel's count for it. With
``--docs`` the tables go into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.document import host, markdown_table, replace_section
from benchmarks.processes import Took
from benchmarks.sparse_disk import change_sparse_disk, make_sparse_disk
from benchmarks.tools import Vmsnap

LIMIT_BYTES = 400 << 20
"""What no backup may take."""


@dataclass(frozen=True)
class MemoryUse:
    """One backup, or a restore."""

    what: str
    took: Took
    added_bytes: int


def measure(folder: Path, size_bytes: int, data_bytes: int) -> list[MemoryUse]:
    """Make a sparse disk, and store it three times: as it is, then with 1 % of its data changed, all read and told.

    Blocks. Everything that it makes in `folder` is left there.

    :raises ToolFailed: a backup failed
    """
    disk = folder / "disk.img"
    places = make_sparse_disk(disk, size_bytes, data_bytes)
    tool = Vmsnap(folder / "vmsnap")
    tool.init()
    uses = []

    def note(what: str, took: Took, before: int) -> None:
        uses.append(MemoryUse(what, took, tool.stored_bytes() - before))

    stored = tool.stored_bytes()
    note("first backup", tool.backup(disk), stored)
    change_sparse_disk(disk, places)
    stored = tool.stored_bytes()
    note("1 % of the data changed, all read", tool.backup(disk), stored)
    changed = change_sparse_disk(disk, places, seed=5)
    stored = tool.stored_bytes()
    note("1 % of the data changed, told where", tool.backup_changed(disk, changed), stored)
    return uses


def main() -> int:
    """Measure, print, write; fails where a backup took too much memory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tib", type=float, default=1, help="the size of the disk")
    parser.add_argument("--data-gib", type=float, default=20, help="the data on it")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args()
    size_bytes, data_bytes = int(options.tib * (1 << 40)), int(options.data_gib * (1 << 30))
    with tempfile.TemporaryDirectory(prefix="vmsnap-memory-", dir=options.folder) as folder:
        uses = measure(Path(folder), size_bytes, data_bytes)
    # After the measurements: the kernel counts the memory of this process to those that it starts.
    from benchmarks.tree_growth import tree_growth

    growth = tree_growth(size_bytes)
    heading = f"{host()}. A sparse disk of {options.tib:g} TiB with {options.data_gib:g} GiB of data, encrypted."
    backups = markdown_table(
        ["", "peak memory", "time", "added"],
        [
            [
                use.what,
                f"{use.took.peak_bytes / (1 << 20):.0f} MiB",
                f"{use.took.seconds:.1f} s",
                _size(use.added_bytes),
            ]
            for use in uses
        ],
    )
    trees = markdown_table(
        [f"the tree of a full disk of {options.tib:g} TiB", "changed chunks", "new nodes", "added"],
        [[each.what, str(each.changed_chunks), str(each.nodes), _size(each.added_bytes)] for each in growth],
    )
    most = max(use.took.peak_bytes for use in uses)
    verdict = f"The limit is {LIMIT_BYTES >> 20} MiB: {'met' if most <= LIMIT_BYTES else '**not met**'}."
    text = "\n\n".join((heading, backups, verdict, trees))
    print(text)
    if options.docs:
        replace_section("memory", text)
    return int(most > LIMIT_BYTES)


def _size(size_bytes: int) -> str:
    return f"{size_bytes} bytes" if size_bytes < 10_000 else f"{size_bytes / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
