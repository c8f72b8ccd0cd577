"""The measurements as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.pause_measure import GuestResult, LivePause

_LEGEND = """\
Times in milliseconds. live: from QEMU's event STOP to its event RESUME. copy: the same of plain stop-and-copy, the
median of those made on the same guest between the backups; ratio: copy / live. predicted: the median of what vmsnap
expected. The guest's own view of each backup as a whole, the worst of them: "stopped" is for how long its machine was
stopped, by the mainboard's clock against its own; "waited" is the longest time that a real-time thread of it waited
while the machine was running (its clock stands still while the machine is stopped, so the pause is not in it);
"quiet" is the same wait in some seconds without any backup: what of it is this host. takes: seconds of the whole
backup."""

_HEADINGS = (
    "QEMU", "GiB", "capture", "n", "live", "min", "max", "predicted", "copy", "ratio",
    "stopped", "waited", "quiet", "takes",
)  # fmt: skip


def tables(results: Sequence[GuestResult]) -> str:
    """The table of pauses, the legend, and where within the pause its time goes."""
    rows = [row for result in results for row in _rows(result)]
    refused = [
        f"QEMU {result.qemu}, {result.memory_gib:g} GiB, {capture}: {reason}"
        for result in results
        for capture, reason in result.failures.items()
    ]
    parts = [row for result in results for row in _part_rows(result)]
    headings = ("QEMU", "GiB", "capture", *_STEPS)
    return "\n\n".join(
        [
            _aligned(_HEADINGS, rows),
            _LEGEND,
            *(["Not measured:\n" + "\n".join(refused)] if refused else []),
            "Where the pause goes (medians; milliseconds from one step to the next, as the manifests tell):",
            _aligned(headings, parts),
        ]
    )


_STEPS = ("disks", "memory", "running")
"""What is reached: from STOP to the disks' snapshots, to the duplicate of memory, to RESUME."""


def _rows(result: GuestResult) -> Iterator[tuple[str, ...]]:
    copy = statistics.median(copy.seconds for copy in result.copies) if result.copies else None
    for wanted, lives in _by_capture(result):
        pauses = [live.pause_seconds for live in lives]
        median = statistics.median(pauses)
        predicted = [live.predicted_seconds for live in lives if live.predicted_seconds is not None]
        yield (
            result.qemu,
            f"{result.memory_gib:g}",
            _capture(wanted, lives),
            str(len(lives)),
            _ms(median),
            _ms(min(pauses)),
            _ms(max(pauses)),
            _ms(statistics.median(predicted)) if predicted else "-",
            _ms(copy) if copy is not None else "-",
            f"{copy / median:.0f}" if copy is not None else "-",
            _ms(max(live.guest.stopped_seconds for live in lives)),
            _ms(max(live.guest.waited_seconds for live in lives)),
            _ms(result.quiet.waited_seconds),
            f"{statistics.median(live.backup_seconds for live in lives):.1f}",
        )


def _part_rows(result: GuestResult) -> Iterator[tuple[str, ...]]:
    for wanted, lives in _by_capture(result):
        parts = [_parts(live) for live in lives]
        medians = [_ms(statistics.median(column)) for column in zip(*parts, strict=True)]
        yield (result.qemu, f"{result.memory_gib:g}", _capture(wanted, lives), *medians)


def _parts(live: LivePause) -> tuple[float, float, float]:
    """Seconds from STOP to the last snapshot, from there to the duplicate, from there to RESUME."""
    at = dict(live.moments)
    pause, duplicate, resume = (at[name] for name in ("pause", "duplicate", "resume"))
    disks = max([time for name, time in at.items() if name not in ("pause", "duplicate", "resume")], default=pause)
    return disks - pause, duplicate - disks, resume - duplicate


def _by_capture(result: GuestResult) -> Iterator[tuple[str, list[LivePause]]]:
    for wanted in dict.fromkeys(live.wanted_capture for live in result.live):
        yield wanted, [live for live in result.live if live.wanted_capture == wanted]


def _capture(wanted: str, lives: Sequence[LivePause]) -> str:
    used = "/".join(sorted({live.capture for live in lives}))
    return wanted if used == wanted else f"{wanted}: {used}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:.0f}"


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    lines = []
    for row in (headings, *rows):
        cells = [
            cell.ljust(width) if column == 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
