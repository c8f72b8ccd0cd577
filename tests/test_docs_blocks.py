"""Every code block of README and docs is run by a test, or listed here with the reason why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import vmsnap
from vmsnap.cli import backends, main
from vmsnap.cli.session import Session

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "vmsnap": main.vmsnap,
    "vmsnap-libvirt": backends.vmsnap_libvirt,
}
TRANSCRIPTS = {
    "tutorial.md": "test_out_of_tree_examples.py",
    **dict.fromkeys(
        ("simulated.md", "qemu.md", "libvirt.md", "iscsi.md", "zfs.md", "local.md", "sftp.md", "storage.md"),
        "test_transcripts.py",
    ),
    "lvm.md": "in_guest/test_lvm_page.py",
}
"""Pages with blocks of the language console, and the tests that run them."""
PYTHON = {
    "library.md": "test_library_page.py",
    "writing-a-storage-backend.md": "test_writing_a_storage_backend.py",
}
"""Pages whose Python is run elsewhere; that of the others is run here."""
DATA = {"toml", "json"}
"""Languages of files that are shown: read by their parsers here."""

ELSEWHERE = "needs what is not here; the same is done by "
WHOLE = {
    ("README.md", "make "): "this is CI itself",
    ("README.md", "$ "): "a transcript of `make demo` on a guest of the lab, which CI runs",
    ("README.md", "vmsnap/"): "the plan of the house, no commands",
    ("api.md", "curl"): ELSEWHERE + "test_agent_api.py, by httpx",
    ("copy.md", "vmsnap"): ELSEWHERE + "test_repository_copy.py and test_sftp_repository.py, on a real SSH server",
    ("examples.md", "cd "): ELSEWHERE + "test_out_of_tree_examples.py",
    ("hypervisors.md", "qemu-system"): ELSEWHERE + "test_transcripts.py, page qemu.md",
    ("iscsi.md", "vmsnap restore"): ELSEWHERE + "test_iscsi_qemu.py, on the LUNs of a real tgtd",
    ("libvirt.md", "pip install"): ELSEWHERE + "test_libvirt_driver.py, on a real libvirtd",
    ("libvirt.md", "$ vmsnap-libvirt list-vms"): "a transcript of domains that test_libvirt_inputs.py has and lists",
    ("lvm.md", "make coverage"): "measures tests that CI runs; what a run says at its end, test_brought_out.py has",
    ("pause.md", "sh "): "how the table is measured: an hour, and nothing else running",
    (
        "pause.md",
        ".venv/bin/python -m benchmarks.mech",
    ): "how the table is measured: a quarter of an hour, and nothing else running",
    ("pause.md", "2 cores"): "the table that was measured",
    ("performance.md", ""): "how the tables are measured: an hour, and nothing else running",
    ("repair.md", "$ "): "of a repository that was damaged on purpose; the same is done by test_cli_integrity.py",
    ("repository-format.md", '"VMSNAPP1"'): "a picture of bytes, no command",
    ("restore-onto.md", "vmsnap export"): ELSEWHERE + "test_cli_export_onto.py; the page's Python is run here",
    ("sftp.md", "Match User"): "lines of sshd_config; test_sftp_access.py has a server with its own",
    ("tutorial.md", "python3 -m venv"): ELSEWHERE + "test_out_of_tree_examples.py, in an environment of its own",
    ("zfs.md", "zfs allow"): "needs OpenZFS and another user; the page says that it is not tried",
    ("writing-a-storage-backend.md", "pip install"): ELSEWHERE + "test_out_of_tree_examples.py",
    ("writing-a-storage-backend.md", "vmsnap"): ELSEWHERE + "test_writing_a_storage_backend.py",
    ("writing-a-snapshot-mechanism.md", "plan →"): "a picture, no command",
    ("writing-a-hypervisor.md", "describe →"): "a picture, no command",
}
"""Page and begin of a block: why it is not run."""
LINES = {
    ("README.md", "pip install"): ELSEWHERE + "test_out_of_tree_examples.py, of the built wheel",
    ("README.md", "export VMSNAP_REPOSITORY"): "the house of these tests has a repository and a passphrase of its own",
    ("README.md", "vmsnap init"): "done where the house of these tests is made",
    ("README.md", "vmsnap vm add web1 --hypervisor qemu"): ELSEWHERE + "test_transcripts.py on a real QEMU",
    ("README.md", "vmsnap copy"): ELSEWHERE + "test_repository_copy.py and test_sftp_repository.py",
    ("README.md", "vmsnap export web1-20261123T021530Z-a1b2c3 --disk"): ELSEWHERE + "test_cli_export_onto.py",
    ("README.md", "vmsnap agent"): "runs until it is ended; " + ELSEWHERE + "test_agent_loop.py",
    ("agent.md", "pip install"): ELSEWHERE + "test_packaging.py",
    ("agent.md", "systemctl"): ELSEWHERE + "in_guest/test_systemd.py, under a real systemd",
    ("agent.md", "vmsnap agent units"): ELSEWHERE + "in_guest/test_systemd.py, where /etc is the guest's own",
    ("agent.md", "vmsnap schedule run-now"): ELSEWHERE + "test_agent_loop.py, with an agent that runs",
    ("agent.md", "vmsnap backup web1"): ELSEWHERE + "test_agent_api.py, over a socket and over TLS",
    ("agent.md", "virsh"): "of a libvirt that has a domain web1, which there is not",
    ("agent.md", "vmsnap agent tags"): "asks that libvirt",
    ("agent.md", "export VMSNAP_AGENT"): "the address of a host that there is not",
    ("retention.md", "vmsnap key remove"): "shown being refused; test_cli_key.py does it",
}
"""Page and begin of a line in a block of which the others are run: why it is not."""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    def commands(self) -> list[str]:
        """What is typed: lines after a prompt, or all where none has one."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return prompted or [line for line in lines if line.strip()]

    def reason(self, line: str) -> str:
        """Why a line of it is not run; empty where it is to be."""
        for listed, text in ((WHOLE, self.text), (LINES, line)):
            for (page, begin), reason in listed.items():
                if page == self.page and text.startswith(begin):
                    return reason
        return ""


def blocks() -> Iterator[Block]:
    for path in PAGES:
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
            if not found[1].startswith("{"):
                yield Block(path.name, found[1], found[2])


ALL = list(blocks())


def is_shell(block: Block) -> bool:
    return block.language in ("", "sh")


RUN_HERE: dict[str, list[str]] = {}
for shell in filter(is_shell, ALL):
    for command in shell.commands():
        if not shell.reason(command):
            RUN_HERE.setdefault(shell.page, []).append(command)


def test_every_block_has_a_language_that_somebody_runs() -> None:
    assert len(ALL) > 60
    for block in ALL:
        if block.language == "console":
            assert block.page in TRANSCRIPTS, f"nobody runs the console blocks of {block.page}"
        elif block.language == "python":
            assert block.page in PYTHON or block.page in PYTHON_HERE, f"nobody runs the Python of {block.page}"
        else:
            assert is_shell(block) or block.language in DATA | {"text"}, f"{block.language} in {block.page}"


def test_every_test_that_is_named_is_there_and_every_entry_of_the_list_is_used() -> None:
    for named in re.findall(
        r"(?:in_guest/)?test_\w+\.py",
        " ".join([*WHOLE.values(), *LINES.values(), *TRANSCRIPTS.values(), *PYTHON.values()]),
    ):
        assert (ROOT / "tests" / named).is_file(), named
    for page, begin in WHOLE:
        assert any(block.page == page and block.text.startswith(begin) for block in ALL), f"{page} has no {begin!r}"
    for page, begin in LINES:
        lines = [line for block in ALL if block.page == page for line in block.commands()]
        assert any(line.startswith(begin) for line in lines), f"{page} has no line {begin!r} any more"


def test_a_command_that_nobody_runs_is_found() -> None:
    assert not Block("README.md", "", "vmsnap nonsense\n").reason("vmsnap nonsense")
    assert Block("README.md", "", "make demo\n").reason("make demo")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_that_is_shown_exists_with_its_options(script: str) -> None:
    """Also those that are not run here: parsed by the command line itself."""
    seen = 0
    for block in filter(is_shell, ALL):
        for command in block.commands():
            words = command.partition("  #")[0].strip()
            found = re.match(rf"(?:\w+=\S+ )*{script} (.*)", words)
            if found is None or "…" in words:
                continue
            argv = [re.sub(r"^['\"]|['\"]$", "", word) for word in re.findall(r"'[^']*'|\S+", found[1])]
            _parse(SCRIPTS[script], script, argv)
            seen += 1
    assert seen > 0


def _parse(group: click.Command, name: str, argv: list[str]) -> None:
    session = Session(program=name, hypervisor="libvirt" if name == "vmsnap-libvirt" else None)
    context = group.make_context(name, list(argv), obj=session)
    while isinstance(context.command, click.Group) and (rest := [*context._protected_args, *context.args]):
        below_name, below, rest = context.command.resolve_command(context, rest)
        assert below is not None
        context = below.make_context(below_name, rest, parent=context)


class House:
    """A simulated VM web1 in a folder of its own, a repository with one backup of it, and a shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "VMSNAP_STATE_DIR": str(folder / "state"),
            "VMSNAP_REPOSITORY": str(folder / "srv" / "backups"),
            "VMSNAP_PASSPHRASE": "only for this test",
        }
        (folder / "etc" / "vmsnap").mkdir(parents=True)
        (folder / "etc" / "vmsnap" / "second").write_text("another word")
        (folder / "etc" / "vmsnap" / "passphrase").write_text("only for this test")
        self.shell("vmsnap-sim start web1 --memory 8M --disk 8M --disk 8M")
        self.shell("vmsnap init")
        self.backup = json.loads(self.shell("vmsnap backup web1 --json --tag release"))["backup"]

    def shell(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def own(self, command: str) -> str:
        """The command with this house's paths and backup in the place of the page's."""
        command = re.sub(r"web1-\d{8}T\d{6}Z-[0-9a-f]{6}", self.backup, command)
        return re.sub(r"(?<![\w.])/(srv|etc|tmp|dev)/", rf"{self.folder}/\1/", command)


@pytest.fixture
def house() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder:
        made = House(Path(folder))
        try:
            yield made
        finally:
            subprocess.run(
                ["bash", "-c", "for vm in web1 web1-copy; do vmsnap-sim stop --force $vm; done"],
                env=made.environment,
                capture_output=True,
            )


PREPARED = {
    "README.md": {"vmsnap failover web1": "vmsnap-sim stop --force web1"},
    "failover.md": {"vmsnap failover web1": "vmsnap-sim stop --force web1"},
    "consistent.md": {"vmsnap consolidate web1-20260101T120000Z-1a2b3c --target /srv/clean --store": "rm -r srv/clean"},
}
"""What must have happened before a command of a page, which the page tells in words."""


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_commands_of_a_page_run(page: str, house: House) -> None:
    told: dict[str, str] = {}
    lines = ["set -e"]
    for command in RUN_HERE[page]:
        bare = command.partition("  #")[0].strip()
        lines += [line for line in (PREPARED.get(page, {}).get(bare, ""), house.own(command)) if line]
        told[bare] = command
    house.shell("\n".join(lines))
    assert told


PYTHON_HERE = ("README.md", "repair.md", "restore-onto.md", "retention.md")


def test_the_python_of_the_other_pages_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSNAP_STATE_DIR", house.environment["VMSNAP_STATE_DIR"])
    (house.folder / "dev" / "vg0").mkdir(parents=True)
    (house.folder / "dev" / "vg0" / "web1").write_bytes(bytes(8 << 20))
    repository = vmsnap.open_repository(house.environment["VMSNAP_REPOSITORY"], "only for this test")
    examples = [block.text for block in ALL if block.page in PYTHON_HERE and block.language == "python"]
    assert len(examples) == len(PYTHON_HERE)
    for example in examples:
        names = {"repository": repository, "backup": house.backup, "Path": Path}
        exec(house.own(example).replace('passphrase="…"', 'passphrase="only for this test"'), names)


@pytest.mark.parametrize("block", [block for block in ALL if block.language in DATA], ids=lambda block: block.page)
def test_files_that_are_shown_can_be_read(block: Block) -> None:
    if block.language == "json":
        assert json.loads(block.text)
    else:
        import tomllib

        assert tomllib.loads(block.text)
