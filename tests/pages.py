"""Sees that the transcripts on a page of the docs are what its commands print."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from docs import transcripts

DOCS = Path(__file__).parent.parent / "docs"


def see(name: str, folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run the commands of a page in `folder`, and see that it says what they print now.

    With ``VMSNAP_WRITE_TRANSCRIPTS`` in the environment, what is printed is written into the page before. A page that
    says something else is shown as it would be.
    """
    page = (DOCS / name).read_text()
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = transcripts.run(page, folder, {"PATH": beside, "HOME": str(folder), **(variables or {})})
    if os.environ.get("VMSNAP_WRITE_TRANSCRIPTS"):
        (DOCS / name).write_text(found)
    assert transcripts.plain(found) == transcripts.plain((DOCS / name).read_text()), found
    assert "$ vmsnap" in page and found.count("\n$ ") == page.count("\n$ ")
