"""The story of ``vmsnap demo`` on a real Linux guest, with the commands that anybody would type.

    python -m tests.lab.demo [--qemu 7.2]

Boots the lab's guest, backs it up live while it counts, and brings the backup up beside it. What is claimed is seen on
the guests' serial consoles and by a monitor past vmsnap. Removes everything in the end, on Ctrl-C too. Exit code 0 only
if everything was seen to be true, 1 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from tests.lab import LabError, LabMachine, available_qemus, find_qemu, serial
from tests.lab.qmp import seconds_between
from tests.lab.serial import SerialWatch, TimedLine, longest_gap_seconds
from vmsnap.host import HostFolders

VM = "linux1"
COPY = "linux1-copy"
_COUNT_EVERY = 10
SETTINGS = {"touch_mib": 64, "stamp_mib": 32, "count_every": _COUNT_EVERY}
_CHECK_SECONDS = 45.0
_CHILD_SECONDS = 60.0
_POLL_SECONDS = 0.05
_LONGEST_SILENCE_SECONDS = 3.0
_SAME_COUNT_LINES = 2
_INTERRUPTED = 130


class CommandFailed(Exception):
    """A vmsnap command ended with an error."""


class Commands:
    """Runs ``vmsnap``, in view of the people who watch."""

    def __init__(self, folder: Path) -> None:
        self.state_dir = folder / "state"
        self._program = Path(sys.executable).parent / "vmsnap"
        # What this machine's own configuration says is not to play a part.
        configuration = folder / "config.toml"
        configuration.touch()
        self._environment = {
            **os.environ,
            "VMSNAP_STATE_DIR": str(self.state_dir),
            "VMSNAP_REPOSITORY": str(folder / "repository"),
            "VMSNAP_PASSPHRASE": secrets.token_urlsafe(12),
            "VMSNAP_CONFIG": str(configuration),
        }

    def show(self, *words: str) -> None:
        """Run a command and show it with all that it prints.

        :raises CommandFailed: it failed
        """
        click.secho(f"  $ {shlex.join(['vmsnap', *words])}", bold=True)
        for line in self._run(words).splitlines():
            click.echo(f"    {line}")

    def ask(self, *words: str) -> Any:
        """The JSON of a command, run out of sight.

        :raises CommandFailed: it failed
        """
        return json.loads(self._run([*words, "--json"]))

    def _run(self, words: tuple[str, ...] | list[str]) -> str:
        # In a session of its own it gets no Ctrl-C from the terminal, but one from here, and the time to clean up.
        with subprocess.Popen(
            [self._program, *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate()
            except BaseException:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_CHILD_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        if process.returncode:
            raise CommandFailed(f"vmsnap {words[0]} ended with {process.returncode}")
        return output


class Story:
    """Tells the story, and keeps what it claims and whether it was seen."""

    def __init__(self, machine: LabMachine, watch: SerialWatch, commands: Commands) -> None:
        self.claims: dict[str, bool] = {}
        self._machine = machine
        self._watch = watch
        self._vmsnap = commands

    def tell(self) -> None:
        """Do it all. Blocks for half a minute.

        :raises CommandFailed: a command failed
        :raises LabError: a guest failed
        """
        self._works()
        backup = self._back_up()
        self._restore(backup)
        self._look_back()

    def _works(self) -> None:
        _heading("A Linux guest works")
        machine = self._machine
        machine.wait_for_check(40)
        _tell(
            f"QEMU {machine.qemu.version}, pid {machine.pid}: {machine.memory_mib} MiB of RAM, a qcow2 and a raw disk.",
            "The guest writes a counter into RAM and onto both disks, and checks all the time that",
            "the three agree. Its serial console:",
        )
        _quote(machine.serial_text().splitlines()[-3:])
        self.claims["the guest works: it counts, RAM and both disks agree"] = not machine.faults()

    def _back_up(self) -> dict[str, Any]:
        _heading("It is backed up while it works")
        self._vmsnap.show("init")
        self._vmsnap.show("vm", "add", VM, "--hypervisor", "qemu", "-o", f"qmp={self._machine.qmp_socket}")
        seen = len(self._machine.oracle.events())
        self._vmsnap.show("backup", VM)
        backup: dict[str, Any] = self._vmsnap.ask("show", self._vmsnap.ask("list")[0]["backup"])
        events = [each for each in self._machine.oracle.events()[seen:] if each["event"] in ("STOP", "RESUME")]
        once = [each["event"] for each in events] == ["STOP", "RESUME"]
        pause = seconds_between(*events) if once else float("nan")
        _tell(f"A second monitor saw QEMU's events STOP and RESUME, {pause * 1000:.1f} ms apart.")
        self.claims["the pause is what QEMU's events say"] = once and abs(pause - backup["pause_seconds"]) < 0.001
        return backup

    def _restore(self, backup: dict[str, Any]) -> None:
        _heading("A second machine is brought up from the backup, beside the first")
        before_pause = _last_count(self._watch.lines(), backup["moments"][0]["monotonic_ns"] / 1e9)
        self._vmsnap.show("restore", backup["backup"], "--as", COPY, "--run", "--isolated")
        console = Path(self._vmsnap.ask("vm", "show", COPY)["options"]["qmp"]).parent / "serial.log"
        text = _text_after_two_checks(console)
        original = self._machine.latest_count()
        first = next(iter(serial.counts(text)), 0)
        _tell(f"The last that the first guest said before the pause was COUNT {before_pause}.", "The second's console:")
        _quote([line for line in text.splitlines() if line.startswith(("COUNT", "CHECK"))][:2])
        _quote([f"CHECK {count} ok" for count in serial.checks(text)[-1:]])
        _tell(f"The first is at {original} by now.")
        continued = 0 <= first - before_pause <= _SAME_COUNT_LINES * _COUNT_EVERY
        self.claims["the second goes on at the captured count"] = continued and original > first
        agree = len(serial.checks(text)) >= 2 and not serial.faults(text)
        self.claims["the second finds its RAM and both of its disks in agreement"] = agree
        listed = {row["vm"]: row["state"] for row in self._vmsnap.ask("vm", "list")}
        self._vmsnap.show("vm", "list")
        self.claims["both execute, side by side"] = listed == {VM: "executing", COPY: "executing"}

    def _look_back(self) -> None:
        _heading("All that time")
        machine = self._machine
        machine.wait_for_check(machine.latest_check() + 1)
        counts = [line for line in self._watch.lines() if serial.counts(line.text)]
        silence = longest_gap_seconds(counts)
        _tell(
            f"The first guest went from {serial.counts(counts[0].text)[0]} to {machine.latest_count()}; it says a line"
            f" every {_COUNT_EVERY} counts, and was",
            f"never silent for longer than {silence:.2f} s.",
        )
        well = silence < _LONGEST_SILENCE_SECONDS and not machine.faults() and machine.oracle.status() == "running"
        self.claims["the first never stopped counting, and its RAM and disks agree"] = well


def main() -> int:
    """Tell the story; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.demo", description="vmsnap on a real Linux guest.")
    versions = [build.version for build in available_qemus()]
    if not versions:
        click.echo("no QEMU of the lab is here: run tests/lab/install.sh as root", err=True)
        return 1
    parser.add_argument("--qemu", choices=versions, default=versions[0])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    begun = time.monotonic()
    try:
        claims = _tell_it(options.qemu)
    except KeyboardInterrupt:
        click.echo("\ninterrupted; everything is removed", err=True)
        return _INTERRUPTED
    except (CommandFailed, LabError) as e:
        click.echo(f"\nthe demo failed: {e}", err=True)
        return 1
    click.echo()
    for claim, seen in claims.items():
        mark = click.style("seen    ", fg="green") if seen else click.style("NOT SEEN", fg="red", bold=True)
        click.echo(f"  {mark}  {claim}")
    click.echo(f"\nIt took {time.monotonic() - begun:.0f} s; both guests, the repository and the folder are gone.")
    return 0 if all(claims.values()) else 1


def _tell_it(version: str) -> dict[str, bool]:
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="vmsnap-demo-"))
        stack.enter_context(_removed(folder))
        commands = Commands(folder)
        machine = stack.enter_context(LabMachine(folder / VM, find_qemu(version), name=VM, settings=SETTINGS))
        watch = stack.enter_context(SerialWatch(machine.serial_socket))
        story = Story(machine, watch, commands)
        story.tell()
    return story.claims


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """In the end, end what runs out of the folder, and remove it with the guests' RAM that vmsnap holds for it."""
    memory_dir = HostFolders.find(folder / "state").memory_dir
    try:
        yield
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for pid in _processes_of(folder):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(memory_dir, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, before)


def _processes_of(folder: Path) -> list[int]:
    """The QEMUs whose command line names the folder, which nobody else knows: the restored guest is one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program, *words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"qemu" in program and any(os.fsencode(folder) in word for word in words):
            found.append(int(process.name))
    return found


def _text_after_two_checks(log: Path) -> str:
    deadline = time.monotonic() + _CHECK_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace") if log.exists() else ""
        if len(serial.checks(text)) >= 2 or serial.faults(text):
            return text
        time.sleep(_POLL_SECONDS)
    raise LabError(f"the restored guest did not check itself within {_CHECK_SECONDS:g} s")


def _last_count(lines: list[TimedLine], at_seconds: float) -> int:
    """The last count that came before a moment of this host's monotonic clock."""
    counts = [serial.counts(line.text) for line in lines if line.at_seconds <= at_seconds]
    return max((count[-1] for count in counts if count), default=0)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _heading(text: str) -> None:
    click.echo(f"\n{click.style(text, bold=True)}")


def _tell(*lines: str) -> None:
    for line in lines:
        click.echo(f"  {line}")


def _quote(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"    | {line}")


if __name__ == "__main__":
    sys.exit(main())
