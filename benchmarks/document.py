"""Puts measured tables into docs/performance.md, between markers, so that no figure there is typed by hand."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def replace_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between the page's ``<!-- NAME begin -->`` and ``<!-- NAME end -->``.

    :raises ValueError: the page has no such markers
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no place for {name}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def host() -> str:
    """This machine and how busy it is, for a line above a table."""
    found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    total_gib = int(found[1]) / (1 << 20) if found else 0
    named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    processor = named[1].strip() if named else platform.machine()
    software = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores ({processor}), {total_gib:.0f} GiB, {software}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines: list[Sequence[str]] = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
