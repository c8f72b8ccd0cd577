"""A backup takes bounded memory, whatever the size of the disk; benchmarks/memory.py measures it at full size."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.memory import measure
from benchmarks.tree_growth import tree_growth

MIB = 1 << 20


def test_backups_of_a_huge_sparse_disk_take_bounded_memory_and_add_little_more_than_what_changed(
    tmp_path: Path,
) -> None:
    data_bytes = 128 * MIB
    # In a process of its own: the kernel counts the memory of whoever starts a process to that process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as small:
        first, read, told = small.submit(measure, tmp_path, 64 << 30, data_bytes).result()
    for use in (first, read, told):
        # The interpreter, the buffers of four packs and six blocks, the key derivation's 64 MiB at most.
        assert 30 * MIB < use.took.peak_bytes < 320 * MIB, use
    assert data_bytes * 0.4 < first.added_bytes < data_bytes * 0.6, "half of it compresses"
    for use in (read, told):
        assert 0.004 * data_bytes < use.added_bytes < 0.02 * data_bytes, "1 %, and what lies in the same chunks"


def test_the_tree_of_a_changed_disk_grows_by_the_change_alone() -> None:
    whole, unchanged, one, stretch, scattered = tree_growth(16 << 30)
    assert whole.added_bytes > 4 * MIB
    assert unchanged.added_bytes == 0
    assert one.added_bytes < 1024
    assert stretch.added_bytes < whole.added_bytes / 50
    assert scattered.added_bytes < whole.added_bytes / 20
