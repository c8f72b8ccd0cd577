"""What the docs are made of: pages of the program itself, guides that leave nothing out, the man page, completion."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs import generate, make_pause_figure, transcripts
from vmsnap.roles import Hypervisor, SnapshotMechanism, StorageBackend

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = {"hypervisor": Hypervisor, "snapshot-mechanism": SnapshotMechanism, "storage-backend": StorageBackend}


def test_the_commands_page_has_every_command_and_its_options() -> None:
    page = generate.commands_page()
    for heading in ("## vmsnap backup", "### vmsnap vm add", "### vmsnap drivers show"):
        assert f"\n{heading}\n" in page
    assert "--max-pause" in page and page.count("--state-dir DIR") == 1


def test_the_drivers_page_has_every_option() -> None:
    page = generate.drivers_page()
    assert "## hypervisor qemu" in page and "## storage backend s3" in page
    assert "`-o capture=" in page


@pytest.mark.parametrize(("guide", "role"), GUIDES.items())
def test_a_guide_names_every_method_of_its_role(guide: str, role: type[Any]) -> None:
    text = (DOCS / f"writing-a-{guide}.md").read_text()
    methods = [name for name, _ in inspect.getmembers(role, inspect.isfunction) if not name.startswith("_")]
    assert len(methods) > 8
    missing = [name for name in methods if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"docs/writing-a-{guide}.md says nothing of them"


def test_what_a_guide_shows_is_code_that_the_tests_run() -> None:
    for name in ("hypervisor", "snapshot-mechanism"):
        text = (DOCS / f"writing-a-{name}.md").read_text()
        shown = re.findall(r"^```\{literalinclude\} (\S+)$", text, re.MULTILINE)
        assert len(shown) > 8 and all(path.startswith("examples/") and (DOCS / path).is_file() for path in shown)
        assert not re.search(r"^```(python|toml)", text, re.MULTILINE), "code that nobody runs"


def test_a_transcript_is_filled_with_what_is_really_printed(tmp_path: Path) -> None:
    page = "x\n```console\n$ a=5\n$ echo $a; pwd\nold\n```\n```sh\nnot run\n```\n<!-- in any case: touch ended -->\n"
    found = transcripts.run(page, tmp_path, {})
    assert found == page.replace("old", "5\n~/tutorial")
    assert (tmp_path / "ended").exists()
    with pytest.raises(transcripts.TranscriptError, match=r"^false"):
        transcripts.run("```console\n$ echo ok\n$ false\n$ echo later\n```\n", tmp_path, {})
    assert transcripts.plain("took 1.5 s") == transcripts.plain("took 20 ms") != transcripts.plain("took long")


def test_the_figure_of_the_pause_is_that_of_the_backup_beside_it() -> None:
    data = json.loads(make_pause_figure.DATA.read_text())
    assert make_pause_figure.FIGURE.read_text() == make_pause_figure.figure(data)
    steps, moments = make_pause_figure.timeline(data)
    assert [name for name, _ in moments] == ["pause", "disks", "duplicate", "resume"]
    assert [seconds for _, seconds in moments] == sorted(seconds for _, seconds in moments)
    assert 0 < moments[-1][1] < min(step.seconds for step in steps if step.name == "prepare")
    drawn = make_pause_figure.FIGURE.read_text()
    assert "prefers-color-scheme: dark" in drawn and f"stands still for {moments[-1][1] * 1e3:.1f} ms" in drawn


def test_the_man_page_is_built_from_the_same_source(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "sphinx", "-q", "-b", "man", "-d", str(tmp_path / "doctrees"), str(DOCS)]
    subprocess.run([*argv, str(tmp_path / "man")], check=True, capture_output=True, text=True)
    page = (tmp_path / "man" / "vmsnap.1").read_text()
    assert '.TH "VMSNAP" "1"' in page or ".TH VMSNAP 1" in page
    assert "VMSNAP BACKUP" in page.upper() and "\\-\\-max\\-pause" in page


@pytest.mark.parametrize(("words", "expected"), [("vmsnap ba", "backup"), ("vmsnap vm a", "add")])
def test_a_shell_completes_commands(words: str, expected: str) -> None:
    asked = {"_VMSNAP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    argv = [str(Path(sys.executable).with_name("vmsnap"))]
    done = subprocess.run(argv, env=os.environ | asked, capture_output=True, text=True)
    assert f"plain,{expected}" in done.stdout.splitlines(), done.stderr
