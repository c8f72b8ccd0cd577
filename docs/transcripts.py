"""Runs the console blocks of a page, one after the other in one shell, and writes what they really print.

A comment ``<!-- in any case: COMMAND -->`` is run at the end, also after a failure; what comes of it is not looked at.
A block of the language ``console`` has lines that begin with ``$``, each a command, and under each what it printed.
Commands of one page follow each other as somebody would type them: variables and folders stay. Each must succeed.

    python docs/transcripts.py docs/tutorial.md     # runs the commands here, in an empty folder, and rewrites the page
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ENDING = re.compile(r"^<!-- in any case: (.*) -->$", re.MULTILINE)
_MARK = "----- vmsnap transcript -----"
_TIMEOUT_SECONDS = 300


class TranscriptError(Exception):
    """A command of the page failed."""


def commands_in(page: str) -> Iterator[str]:
    """The commands of a page, in order."""
    for block in _BLOCK.findall(page):
        yield from (line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ "))


def run(page: str, folder: Path, variables: Mapping[str, str]) -> str:
    """The page with what its commands print when they are run in `folder`.

    :raises TranscriptError: one failed, or did not end
    """
    commands = list(commands_in(page))
    endings = "; ".join(_ENDING.findall(page)) or ":"
    lines = ["exec 2>&1", f"trap '{endings}' EXIT"]
    for command in commands:
        lines += [command, "status=$?", f"echo '{_MARK}'", "[ $status -eq 0 ] || exit $status"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "110", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    printed = done.stdout.split(f"{_MARK}\n")
    if done.returncode != 0 or len(printed) < len(commands) + 1:
        # a command that failed has its mark, one that ended the shell has none
        failed = max(0, len(printed) - 2 if done.stdout.endswith(f"{_MARK}\n") else len(printed) - 1)
        raise TranscriptError(f"{commands[min(failed, len(commands) - 1)]}\n{done.stdout[-3000:]}")
    outputs = iter(printed)

    def filled(match: re.Match[str]) -> str:
        text = ""
        for line in match[1].splitlines():
            if line.startswith("$ "):
                printed = "\n".join(row.rstrip() for row in next(outputs).splitlines())
                text += f"{line}\n" + (printed.replace(str(folder), "~/tutorial") + "\n" if printed else "")
        return f"```console\n{text}```"

    return _BLOCK.sub(filled, page)


def plain(page: str) -> str:
    """What must be the same each time: a page without numbers, ids and the widths of columns."""
    page = re.sub(r"\b[0-9a-f]{32}\b|\b(bk-|vmsnap-)?[0-9a-f]{10}\b|\b[0-9a-f]{12}\b", "ID", page)
    page = re.sub(r"-\d{8}T\d{6}Z-[0-9a-f]{6}", "-ID", page)
    page = re.sub(r"\d+(\.\d+)?( (B|KiB|MiB|GiB|ms|s|min|µs)\b)?", "N", page)
    return re.sub(r"[ ─━-]{2,}", " ", page)


def main() -> None:
    """Rewrite the pages that are named."""
    for name in sys.argv[1:]:
        page = Path(name)
        with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder:
            beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            page.write_text(run(page.read_text(), Path(folder), {"PATH": beside, "HOME": folder}))


if __name__ == "__main__":
    main()
