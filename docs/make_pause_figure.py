"""Draws docs/figures/pause-window.svg: one real backup in time, and its pause window larger.

What is drawn stands in docs/figures/pause-window.json, taken of a backup of a QEMU by::

    python docs/make_pause_figure.py --of VM      # by `vmsnap show` and `vmsnap log` of its last backup

Without arguments the figure is drawn anew; ``--check`` writes nothing and fails where it is not what the file says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent / "figures"
DATA, FIGURE = FIGURES / "pause-window.json", FIGURES / "pause-window.svg"
WIDTH, LEFT, RIGHT, ROW = 860, 150, 30, 26
SHOWN = ("check", "prepare", "pause", "snapshot", "duplicate", "resume", "store", "release")
WORDS = {
    "pause": "the guest stops",
    "disks": "disks are fixed",
    "duplicate": "memory is fixed",
    "resume": "it runs again",
}
STYLE = """
.paper { fill: #ffffff } .ink { fill: #1f2328 } .faint { fill: #57606a } .line { stroke: #8c959f }
.runs { fill: #6cb6ff } .stands { fill: #f0883e } .work { fill: #8ddb8c } .zoom { fill: #f0883e; fill-opacity: 0.15 }
@media (prefers-color-scheme: dark) {
.paper { fill: #0d1117 } .ink { fill: #e6edf3 } .faint { fill: #9da7b3 } .line { stroke: #6e7681 }
.runs { fill: #316dca } .stands { fill: #db6d28 } .work { fill: #347d39 } .zoom { fill: #db6d28; fill-opacity: 0.3 }
}
"""


@dataclass(frozen=True)
class Step:
    """An instruction: when it began after the first one, and how long it took."""

    name: str
    begin_seconds: float
    seconds: float


def timeline(data: dict[str, Any]) -> tuple[list[Step], list[tuple[str, float]]]:
    """The instructions that are drawn, and the moments of the pause window in seconds after its begin."""
    begins = {row["instruction"]: datetime.fromisoformat(row["time"]).timestamp() for row in data["log"]}
    took = {row["instruction"]: float(row["seconds"]) for row in data["log"]}
    first = min(begins.values())
    steps = [Step(name, begins[name] - first, took[name]) for name in SHOWN]
    start = data["moments"][0]["monotonic_ns"]
    return steps, [(each["name"], (each["monotonic_ns"] - start) / 1e9) for each in data["moments"]]


def figure(data: dict[str, Any]) -> str:
    """The figure as SVG, in colours that follow the reader's scheme."""
    steps, moments = timeline(data)
    end = max(step.begin_seconds + step.seconds for step in steps)
    room = WIDTH - LEFT - RIGHT

    def at(seconds: float) -> float:
        return LEFT + room * seconds / end

    pause = moments[-1][1]
    stop = next(step.begin_seconds for step in steps if step.name == "pause")
    height = 130 + ROW * len(steps) + 150
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="13">',
        f"<title>One backup in time, and its pause of {pause * 1e3:.1f} ms</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="ink" x="16" y="24">One backup, {end:.2f} s: the guest stands still for {pause * 1e3:.1f} ms'
        f" of it ({escape(data['what'])})</text>",
    ]

    def bar(row: int, name: str, kind: str, begin: float, seconds: float, told: str) -> None:
        y = 44 + ROW * row
        x, width = at(begin), max(1.5, room * seconds / end)
        parts.append(f'<text class="ink" x="16" y="{y + 14}">{escape(name)}</text>')
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="18"/>')
        beside = x + width + 6
        anchor, place = ("start", beside) if beside < WIDTH - 110 else ("end", x - 6)
        parts.append(f'<text class="faint" x="{place:.1f}" y="{y + 14}" text-anchor="{anchor}">{told}</text>')

    top = 60 + ROW * (len(steps) + 1)
    parts.append(
        f'<path class="zoom" d="M{at(stop):.1f} 62L{at(stop + pause) + 2:.1f} 62L{WIDTH - RIGHT} {top + 30}'
        f'L{LEFT} {top + 30}z"/>'
    )
    bar(0, "the guest", "runs", 0, stop, "")
    parts.append(
        f'<rect class="runs" x="{at(stop + pause):.1f}" y="44" width="{at(end) - at(stop + pause):.1f}" height="18"/>'
    )
    parts.append(
        f'<rect class="stands" x="{at(stop):.1f}" y="44" width="{max(2.0, room * pause / end):.1f}" height="18"/>'
    )
    for row, step in enumerate(steps, 1):
        in_window = step.name in ("pause", "snapshot", "duplicate", "resume")
        bar(
            row,
            step.name,
            "stands" if in_window else "work",
            step.begin_seconds,
            step.seconds,
            f"{step.seconds * 1e3:.0f} ms",
        )
    parts.append(f'<text class="ink" x="16" y="{top + 50}">the pause window</text>')
    last = pause or 1.0
    parts.append(f'<rect class="stands" x="{LEFT}" y="{top + 30}" width="{room}" height="30"/>')
    for level, (name, seconds) in enumerate(moments):
        x = LEFT + room * seconds / last
        anchor = "start" if x < WIDTH / 2 else "end"
        parts.append(f'<path class="line" d="M{x:.1f} {top + 24}V{top + 74 + 18 * level}" stroke-width="2"/>')
        told = f"{WORDS[name]}, {seconds * 1e3:.1f} ms"
        beside = x + 6 if anchor == "start" else x - 6
        parts.append(
            f'<text class="ink" x="{beside:.1f}" y="{top + 78 + 18 * level}" text-anchor="{anchor}">{told}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def of_backup(vm: str) -> dict[str, Any]:
    """What is drawn, of the last backup of a VM.

    :raises subprocess.CalledProcessError: vmsnap does not know it
    """

    def told(*words: str) -> Any:
        return json.loads(subprocess.run(["vmsnap", *words, "--json"], check=True, capture_output=True).stdout)

    backup = told("list", "--vm", vm)[-1]["backup"]
    shown = told("show", backup)
    log = [row for row in told("log", vm) if row.get("instruction") in SHOWN]
    what = f"QEMU {shown['hypervisor_version']}, {shown['memory_bytes'] >> 20} MiB, {len(shown['disks'])} disks"
    return {
        "what": what,
        "moments": [{"name": each["name"], "monotonic_ns": each["monotonic_ns"]} for each in shown["moments"]],
        "log": [{key: row[key] for key in ("instruction", "time", "seconds")} for row in log[-len(SHOWN) :]],
    }


def main() -> None:
    """Write the figure, or with ``--check`` compare it."""
    if "--of" in sys.argv:
        DATA.write_text(json.dumps(of_backup(sys.argv[sys.argv.index("--of") + 1]), indent=1) + "\n")
    drawn = figure(json.loads(DATA.read_text()))
    if "--check" in sys.argv:
        stale = not FIGURE.exists() or FIGURE.read_text() != drawn
        sys.exit(f"stale: {FIGURE.name}; run: python docs/make_pause_figure.py" if stale else 0)
    FIGURE.write_text(drawn)


if __name__ == "__main__":
    main()
