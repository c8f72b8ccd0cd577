"""The measurements as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.document import markdown_table
from benchmarks.pause_measure import GuestResult, LivePause

FIRST_ROUNDS = 2
"""So many backups of a fresh guest are not counted as later ones."""

_LEGEND = """\
Times in milliseconds. later: from QEMU's event STOP to its event RESUME, the median of all backups in a row but the
first two, with their range; first, fifth: of these. copy: the same of plain stop-and-copy, the median of those
made on the same guest after the backups; savevm: of QEMU's savevm; ratio: copy / later. predicted: the median
of what vmsnap expected of the later ones. The guest's own view of each backup as a whole, the worst of all: "stopped"
is for how long its machine was stopped, by the mainboard's clock against its own; "waited" is the longest time that a
real-time thread of it waited while the machine was running (its clock stands still while the machine is stopped,
so the pause is not in it); "quiet" is the same wait in some seconds without any backup: what of it is this host.
takes: seconds of the whole backup, of the later ones."""

_HEADINGS = (
    "QEMU", "GiB", "capture", "n", "first", "fifth", "later", "min", "max", "predicted", "copy", "ratio", "savevm",
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
    headings = ("QEMU", "GiB", "capture", *_STEPS, "round trip")
    return "\n\n".join(
        [
            _aligned(_HEADINGS, rows),
            _LEGEND,
            *(["Not measured:\n" + "\n".join(refused)] if refused else []),
            "Where the pause goes (medians of the later ones; milliseconds from one step to the next, as manifests\n"
            "tell; round trip: one question to QEMU's monitor and its answer):",
            _aligned(headings, parts),
        ]
    )


_STEPS = ("disks", "memory", "running")
"""What is reached: from STOP to the disks' snapshots, to the duplicate of memory, to RESUME."""


def short_table(results: Sequence[GuestResult]) -> str:
    """A row a size, for people who are in a hurry."""
    versions = sorted({result.qemu for result in results}, key=float)
    head = ["touched RAM"]
    for version in versions:
        head += [f"QEMU {version}", "stop-and-copy", "savevm"]
    lines = []
    for size in sorted({result.memory_gib for result in results}):
        line = [f"{size:g} GiB"]
        for version in versions:
            found = [result for result in results if (result.qemu, result.memory_gib) == (version, size)]
            line += _short_cells(found[0]) if found else ["-", "-", "-"]
        lines.append(line)
    return markdown_table(head, lines)


def _short_cells(result: GuestResult) -> list[str]:
    later = _later([live for live in result.live if live.wanted_capture == "auto"])
    return [
        _ms(statistics.median(live.pause_seconds for live in later)) if later else "-",
        _median_ms([copy.seconds for copy in result.copies]),
        _median_ms(result.saved_seconds),
    ]


def _later(lives: Sequence[LivePause]) -> Sequence[LivePause]:
    return lives[FIRST_ROUNDS:] or lives


def _rows(result: GuestResult) -> Iterator[tuple[str, ...]]:
    copy = statistics.median(copy.seconds for copy in result.copies) if result.copies else None
    for wanted, lives in _by_capture(result):
        later = _later(lives)
        pauses = [live.pause_seconds for live in later]
        median = statistics.median(pauses)
        predicted = [live.predicted_seconds for live in later if live.predicted_seconds is not None]
        yield (
            result.qemu,
            f"{result.memory_gib:g}",
            _capture(wanted, lives),
            str(len(lives)),
            _ms(lives[0].pause_seconds),
            _ms(lives[4].pause_seconds) if len(lives) > 4 else "-",
            _ms(median),
            _ms(min(pauses)),
            _ms(max(pauses)),
            _median_ms(predicted),
            _ms(copy) if copy is not None else "-",
            f"{copy / median:.0f}" if copy is not None else "-",
            _median_ms(result.saved_seconds),
            _ms(max(live.guest.stopped_seconds for live in lives)),
            _ms(max(live.guest.waited_seconds for live in lives)),
            _ms(result.quiet.waited_seconds),
            f"{statistics.median(live.backup_seconds for live in later):.1f}",
        )


def _median_ms(seconds: Sequence[float]) -> str:
    return _ms(statistics.median(seconds)) if seconds else "-"


def _part_rows(result: GuestResult) -> Iterator[tuple[str, ...]]:
    for wanted, lives in _by_capture(result):
        parts = [_parts(live) for live in _later(lives)]
        medians = [_ms(statistics.median(column)) for column in zip(*parts, strict=True)]
        yield (
            result.qemu,
            f"{result.memory_gib:g}",
            _capture(wanted, lives),
            *medians,
            f"{result.round_trip_seconds * 1000:.2f}",
        )


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
