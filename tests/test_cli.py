"""The frame of the command line: what it imports, how it errs, how it is configured. By the real scripts."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from vmsnap import __version__
from vmsnap.cli.failures import exit_code_of
from vmsnap.cli.main import COMMANDS
from vmsnap.cli.session import Session
from vmsnap.errors import Busy
from vmsnap.host import HostFolders

BIN = Path(sys.executable).parent


class Scripts:
    """Runs the console scripts in an environment of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "TMPDIR": str(folder),
            "VMSNAP_STATE_DIR": str(self.state),
        }

    def run(
        self, *words: str, script: str = "vmsnap", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, without a terminal."""
        return subprocess.run(
            [str(BIN / script), *words],
            env=self.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def text(self, *words: str, script: str = "vmsnap", **environment: str) -> str:
        """What it writes for people; it must succeed."""
        done = self.run(*words, script=script, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words: str, script: str = "vmsnap", **environment: str) -> Any:
        """What it reports as JSON; it must succeed and write nothing else to standard output."""
        return json.loads(self.text(*words, "--json", script=script, **environment))

    def error(self, code: int, *words: str, script: str = "vmsnap", **environment: str) -> str:
        """The one line with which it fails; nothing may stand on standard output."""
        done = self.run(*words, script=script, environment=environment)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.startswith(f"{script}: ") and done.stderr.endswith("\n"), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.strip()

    def close(self) -> None:
        """End what was started, and remove what lies in memory."""
        if not self.state.exists():
            return
        started = (self.state / "simulated").exists()
        for vm in self.json("list", script="vmsnap-sim") if started else []:
            self.run("stop", "--force", vm["vm"], script="vmsnap-sim")
        shutil.rmtree(HostFolders.find(self.state).memory_dir, ignore_errors=True)


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    yield made
    made.close()


# -- help, and what it costs

HEAVY = {
    "argon2",
    "backports.zstd",
    "blake3",
    "cryptography",
    "importlib.metadata",
    "msgspec",
    "numpy",
    "rich",
    "sqlite3",
    "stevedore",
    "vmsnap.controller",
    "vmsnap.registry",
    "vmsnap.repository",
    "vmsnap_drivers",
}


def imported(scripts: Scripts, *calls: tuple[str, ...]) -> set[str]:
    """The modules of `HEAVY` that are imported after these calls in one process."""
    program = (
        "import json, sys\n"
        "from vmsnap.cli.main import vmsnap\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        vmsnap(words)\n"
        "    except SystemExit as e:\n"
        "        assert not e.code, words\n"
        "json.dump(sorted(sys.modules), sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(calls)],
        env=scripts.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return HEAVY & set(json.loads(done.stderr))


def test_help_imports_nothing_that_only_work_needs(scripts: Scripts) -> None:
    helps = [("--help",), ("--version",), ("vm", "add", "--help"), *((name, "--help") for name in COMMANDS)]
    assert imported(scripts, *helps) == set()


def test_list_imports_only_what_reads_manifests(scripts: Scripts) -> None:
    repository = str(scripts.folder / "repository")
    scripts.text("init", "-r", repository)
    needless = {"numpy", "rich", "cryptography", "argon2", "sqlite3", "vmsnap.controller", "backports.zstd"}
    assert not imported(scripts, ("list", "-r", repository)) & (needless | {"vmsnap_drivers"})


def test_vm_list_imports_no_driver(scripts: Scripts) -> None:
    assert not imported(scripts, ("vm", "list")) & {"numpy", "rich", "cryptography", "vmsnap_drivers"}


def test_help_names_every_command_in_a_line(scripts: Scripts) -> None:
    lines = scripts.text("--help").splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split()[:1] == [name] and command.summary in line for line in lines), name


@pytest.mark.parametrize("script", ["vmsnap", "vmsnap-qemu", "vmsnap-sim", "vmsnap-local"])
def test_each_script_has_help_and_version(scripts: Scripts, script: str) -> None:
    assert "Examples:" in scripts.text("--help", script=script)
    assert scripts.text("--version", script=script) == f"{script} {__version__}\n"


def test_a_backends_help_shows_the_options_of_its_driver(scripts: Scripts) -> None:
    for words in [("--help",), ("vm", "add", "--help"), ("restore", "--help")]:
        assert "-o qmp=" in scripts.text(*words, script="vmsnap-qemu")


# -- wrong usage

WRONG_USAGE = [
    (("lits",), "did you mean 'list'"),
    (("backup",), "missing argument"),
    (("backup", "--nonsense", "web1"), "--nonsense"),
    (("backup", "web1", "--mode", "warm"), "'warm' is not one of"),
    (("backup", "web1", "--keep-for", "soon"), "'soon' is no duration"),
    (("consolidate", "web1"), "missing option '--target'"),
    (("backup", "web1", "--max-pause", "long"), "long"),
    (("list",), "no repository was named"),
    (("vm", "add", "web1"), "no hypervisor was named"),
    (("vm", "add", "../web1", "--hypervisor", "simulated"), "not a valid VM name"),
    (("vm", "add", "web1", "--hypervisor", "simulated", "-o", "socket"), "not -o key=value"),
    (("vm", "add", "web1", "--hypervisor", "simulated", "-o", "colour=red"), "no option 'colour'"),
    (("vm", "add", "web1", "--hypervisor", "simulated", "-o", "timeout=1", "-o", "timeout=2"), "given twice"),
    (("vm", "add", "web1", "--hypervisor", "simulated", "--mechanism", "file"), "not --mechanism DISK=NAME"),
    (("init", "-r", "/nowhere", "--encryption", "aes256-gcm"), "needs a passphrase"),
]


@pytest.mark.parametrize(("words", "said"), WRONG_USAGE)
def test_wrong_usage_is_one_line_and_2(scripts: Scripts, words: tuple[str, ...], said: str) -> None:
    assert said in scripts.error(2, *words)


def test_what_is_not_there_is_3_and_6(scripts: Scripts) -> None:
    assert "no VM named 'web1'" in scripts.error(3, "backup", "web1", "-r", str(scripts.folder / "nothing"))
    assert "no VM named 'web1'" in scripts.error(3, "vm", "show", "web1")
    assert "no VM named 'web1'" in scripts.error(3, "doctor", "web1")
    assert "no VM named 'web1'" in scripts.error(3, "failover", "web1")
    assert "no duplicate named 'bk-1'" in scripts.error(3, "duplicate", "discard", "bk-1")
    assert "no vmsnap repository" in scripts.error(3, "list", "-r", str(scripts.folder / "nothing"))
    assert "no hypervisor driver 'xen'" in scripts.error(6, "vm", "add", "web1", "--hypervisor", "xen")
    assert "no storage backend driver 'tape'" in scripts.error(6, "list", "-r", "tape://robot/1")
    assert "no driver 'xen'" in scripts.error(6, "drivers", "show", "xen")


def test_errors_with_json_are_the_same_line(scripts: Scripts) -> None:
    assert "no VM named 'web1'" in scripts.error(3, "vm", "show", "web1", "--json")


def test_debug_shows_the_traceback_before_the_line(scripts: Scripts) -> None:
    done = scripts.run("vm", "show", "web1", "--debug")
    assert done.returncode == 3 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vmsnap: no VM named")


def test_options_of_every_command_count_before_and_after_it(scripts: Scripts) -> None:
    other = str(scripts.folder / "other")
    assert scripts.json("--state-dir", other, "vm", "list") == []
    assert json.loads(scripts.text("--json", "vm", "list", "--state-dir", other)) == []
    assert (scripts.folder / "other" / "vmsnap.db").exists() and not scripts.state.exists()


def test_a_reader_that_goes_away_is_no_error(scripts: Scripts) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [str(BIN / "vmsnap"), "drivers"], env=scripts.environment, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert done.stderr == b""


def test_what_nobody_foresaw_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError("first line\nsecond \x1b[31mline")

    assert exit_code_of(fail, Session()) == 1
    said = "vmsnap: unexpected ZeroDivisionError: first line second ?[31mline"
    assert capsys.readouterr().err == f"{said}; run again with --debug\n"


def test_notes_of_an_error_are_further_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        error = Busy("somebody is at it", cure="wait")
        error.add_note("the backup x is stored all the same")
        raise error

    assert exit_code_of(fail, Session()) == 5
    assert capsys.readouterr().err == (
        "vmsnap: somebody is at it (wait)\nvmsnap: the backup x is stored all the same\n"
    )


# -- drivers and doctor


def test_drivers_are_listed_with_what_is_wrong(scripts: Scripts) -> None:
    found = {(driver["kind"], driver["name"]): driver for driver in scripts.json("drivers")}
    assert found["hypervisor", "simulated"]["usable"] is True
    assert found["storage backend", "file"].keys() >= {"version", "distribution", "problem"}
    assert found["snapshot mechanism", "file"]["capabilities"] == ["clones"]
    assert found["hypervisor", "simulated"]["capabilities"] == []
    (shown,) = scripts.json("drivers", "show", "simulated")
    assert "socket" in {option["name"] for option in shown["options"]}
    assert len(scripts.json("drivers", "show", "file")) == 2
    assert "-o socket=PATH" in scripts.text("drivers", "show", "simulated")
    assert {option["name"]: option["type"] for option in shown["options"]} == {"socket": "path", "timeout": "seconds"}


def test_drivers_say_what_is_missing_here(scripts: Scripts) -> None:
    found = {(driver["kind"], driver["name"]): driver for driver in scripts.json("drivers", PATH="/nowhere")}
    qemu, qcow2 = found["hypervisor", "qemu"], found["snapshot mechanism", "qcow2"]
    assert not qemu["usable"] and not qcow2["usable"]
    assert qemu["problem"] == qcow2["problem"] == ""
    assert "qemu-system-x86_64" in qemu["missing"][0]["what"] and qemu["missing"][0]["cure"].startswith("apt install")
    assert qcow2["missing"] == [{"what": "qemu-img is not on PATH", "cure": "apt install qemu-utils"}]
    assert found["hypervisor", "simulated"]["usable"] and found["storage backend", "file"]["missing"] == []
    assert "no: qemu-img is not on PATH (apt install qemu-utils)" in scripts.text("drivers", PATH="/nowhere")


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("vmsnap-sim", "-o timeout=SECONDS"),
        ("vmsnap-qemu", "-o qmp=PATH"),
        ("vmsnap-libvirt", "-o define=yes|no"),
        ("vmsnap-lvm", "-o pool_limit=N"),
        ("vmsnap-zfs", "-o marks=N"),
        ("vmsnap-iscsi", "-o known_hosts=PATH"),
        ("vmsnap-s3", "-o object_lock_days=DAYS"),
        ("vmsnap-sftp", "-o connections=N"),
        ("vmsnap-local", "It has none."),
    ],
)
def test_the_help_of_a_backend_shows_its_options(scripts: Scripts, script: str, option: str) -> None:
    assert option in scripts.text("--help", script=script)


def test_a_broken_driver_is_shown_and_takes_no_other_down(scripts: Scripts) -> None:
    package = scripts.folder / "site" / "broken-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vmsnap.hypervisors]\nbroken = no_such_module:Driver\n")
    path = {"PYTHONPATH": str(package.parent)}
    found = {driver["name"]: driver for driver in scripts.json("drivers", **path)}
    assert not found["broken"]["usable"] and "no_such_module" in found["broken"]["problem"]
    assert found["simulated"]["usable"]
    assert "no_such_module" in scripts.error(6, "vm", "add", "web1", "--hypervisor", "broken", **path)
    assert any("no_such_module" in finding["message"] for finding in scripts.json("doctor", **path))


def test_doctor_looks_at_host_and_repository(scripts: Scripts) -> None:
    found = scripts.json("doctor", "-r", str(scripts.folder / "repository"))
    assert {finding["severity"] for finding in found} <= {"ok", "note", "missing"}
    assert any("repository" in finding["subject"] for finding in found)
    assert "cure:" in scripts.text("doctor", "-r", str(scripts.folder / "repository"))


def test_colours_only_on_a_terminal_and_not_against_the_users_will(scripts: Scripts) -> None:
    assert "\x1b[" not in scripts.text("doctor")
    assert "\x1b[" in on_terminal(scripts, "doctor")
    assert "\x1b[" not in on_terminal(scripts, "doctor", NO_COLOR="1")


def on_terminal(scripts: Scripts, *words: str, typed: Sequence[str] = (), **environment: str) -> str:
    """What a script shows on a terminal of its own; each line of `typed` answers one of its questions."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(BIN / "vmsnap", ["vmsnap", *words], scripts.environment | {"TERM": "xterm", **environment})
    answers = list(typed)
    shown = b""
    try:
        while select.select([terminal], [], [], 30)[0] and (data := os.read(terminal, 65536)):
            shown += data
            if answers and shown.endswith(b": "):
                os.write(terminal, answers.pop(0).encode() + b"\n")
    except OSError:
        pass  # the other end is closed
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    return shown.decode()
