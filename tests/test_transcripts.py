"""The transcripts on the how-to pages are what their commands print, run one after the other against the real thing.

To write what is printed into a page anew: ``VMSNAP_WRITE_TRANSCRIPTS=1 pytest tests/test_transcripts.py``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from docs import transcripts
from tests.lab.sshd import SshServer
from tests.servers.s3 import S3Server

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as made:
        yield Path(made)


def see(name: str, folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """See that a page says what is printed now."""
    page = (DOCS / name).read_text()
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = transcripts.run(page, folder, {"PATH": beside, "HOME": str(folder), **(variables or {})})
    if os.environ.get("VMSNAP_WRITE_TRANSCRIPTS"):
        (DOCS / name).write_text(found)
    assert transcripts.plain(found) == transcripts.plain((DOCS / name).read_text())
    assert "$ vmsnap" in page and found.count("\n$ ") == page.count("\n$ ")


@pytest.mark.parametrize("name", ["simulated.md", "local.md"])
def test_a_page_that_needs_nothing_but_python(name: str, folder: Path) -> None:
    see(name, folder)


@pytest.mark.qemu
def test_the_page_of_a_qemu(folder: Path) -> None:
    see("qemu.md", folder)


@pytest.mark.sshd
def test_the_page_of_sftp(folder: Path, tmp_path: Path) -> None:
    with SshServer(tmp_path / "sshd") as server:
        place = server.url(folder / "place")
        see("sftp.md", folder, {"PLACE": place, "VMSNAP_SSH_CONFIG": str(server.config_file)})


def test_the_page_of_s3(folder: Path, swift_server: S3Server) -> None:
    place = f"s3://{swift_server.new_bucket()}/vmsnap"
    see("storage.md", folder, {"PLACE": place, **swift_server.environment()})
