"""Draws docs/protocols.md and its figures from the protocol tables: ``python docs/make_protocols.py``.

``--check`` writes nothing and fails where a file is not what the tables say; the tests use it.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

from vmsnap.protocol import PROTOCOLS, Instruction, Protocol, State

DOCS = Path(__file__).parent
BOX_WIDTH, BOX_HEIGHT, COLUMN, ROW, MARGIN = 170, 30, 250, 66, 16


def slug(protocol: Protocol) -> str:
    """A file name for a protocol."""
    return re.sub(r"[^a-z]+", "-", protocol.name)


def levels(protocol: Protocol) -> dict[State, tuple[int, int]]:
    """Row and column of each state: its distance from the start, and its place among those of the same distance."""
    distance = {protocol.start: 0}
    for (at, _), to in protocol.transitions.items():
        distance[to] = max(distance.get(to, 0), distance[at] + 1)
    rows: dict[int, list[State]] = {}
    for state, row in distance.items():
        rows.setdefault(row, []).append(state)
    return {state: (row, column) for row, states in rows.items() for column, state in enumerate(states)}


def figure(protocol: Protocol) -> str:
    """The state diagram as SVG; the states in which the guest may stand still are tinted."""
    places = levels(protocol)
    width = MARGIN * 2 + BOX_WIDTH + 180 + COLUMN * max(column for _, column in places.values())
    height = MARGIN * 2 + BOX_HEIGHT + ROW * max(row for row, _ in places.values())
    paused = {to for (_, step), to in protocol.transitions.items() if step in protocol.window}
    paused -= {to for (_, step), to in protocol.transitions.items() if step is Instruction.RESUME}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="13">',
        f"<title>{escape(protocol.name)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs>',
    ]
    for (at, step), to in protocol.transitions.items():
        (row, column), (to_row, to_column) = places[at], places[to]
        x, y = MARGIN + BOX_WIDTH / 2 + column * COLUMN, MARGIN + BOX_HEIGHT + row * ROW
        to_x, to_y = MARGIN + BOX_WIDTH / 2 + to_column * COLUMN, MARGIN + to_row * ROW
        label = step.value + (" (if)" if step in protocol.conditions else "")
        parts.append(f'<path d="M{x} {y}L{to_x} {to_y}" stroke="#444" marker-end="url(#tip)"/>')
        parts.append(f'<text x="{(x + to_x) / 2 + 10}" y="{(y + to_y) / 2 + 4}" fill="#333">{escape(label)}</text>')
    for state, (row, column) in places.items():
        fill = "#fde2c8" if state in paused else "#e4eef8"
        x, y = MARGIN + column * COLUMN, MARGIN + row * ROW
        parts.append(
            f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{fill}" stroke="#777"/>'
        )
        parts.append(f'<text x="{x + BOX_WIDTH / 2}" y="{y + 20}" text-anchor="middle">{escape(state.value)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def page() -> str:
    """The page with all protocols: figure, transitions, conditions, compensations."""
    lines = [
        "# Protocols",
        "",
        "Drawn from `vmsnap/protocol/tables.py` by `python docs/make_protocols.py`; do not edit. In tinted states",
        "the guest may stand still. An instruction marked *(if)* is passed over unless its condition holds. After a",
        "failure or a crash the compensations of every instruction that was begun are carried out, the guest first.",
    ]
    for protocol in PROTOCOLS:
        lines += ["", f"## {protocol.name[0].upper()}{protocol.name[1:]}", ""]
        lines += [f"![{protocol.name}](figures/{slug(protocol)}.svg)", ""]
        lines += ["| state | instruction | next state | only if | set right by |", "|---|---|---|---|---|"]
        for (at, step), to in protocol.transitions.items():
            condition = protocol.conditions.get(step)
            compensations = ", ".join(c.value for c in protocol.compensations.get(step, ()))
            only_if = condition.value if condition else ""
            lines.append(f"| {at.value} | `{step.value}` | {to.value} | {only_if} | {compensations} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Write the files, or with ``--check`` compare them."""
    files = {DOCS / "protocols.md": page()}
    files |= {DOCS / "figures" / f"{slug(protocol)}.svg": figure(protocol) for protocol in PROTOCOLS}
    if "--check" in sys.argv:
        stale = [path.name for path, text in files.items() if not path.exists() or path.read_text() != text]
        sys.exit(f"stale: {', '.join(stale)}; run: python docs/make_protocols.py" if stale else 0)
    for path, text in files.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
