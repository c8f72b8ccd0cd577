"""Commands of snapshot mechanisms: output, time-outs, what becomes of them when we die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from vmsnap.errors import DriverUnavailable, SnapshotError
from vmsnap.testing.rigs import eventually
from vmsnap_drivers.runner import LocalRunner, one_line


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def script(folder: Path, text: str, interpreter: str = sys.executable) -> str:
    path = folder / "command"
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)
    return str(path)


def test_all_output_and_the_status_come_back_and_nothing_of_ours_goes_in(tmp_path: Path) -> None:
    text = "import os, sys; print('x' * 300000); print(os.environ['LC_ALL'], sys.stdin.read(), os.getcwd(), end='');"
    text += "print(sorted(os.listdir('/proc/self/fd')), file=sys.stderr); sys.exit(5)"
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        done = LocalRunner().run([script(tmp_path, text)], 60)
    assert done.status == 5 and done.stdout == "x" * 300000 + "\nC  /"
    assert done.stderr.count("'") == 2 * 4, "descriptors 0 to 2, and the one that lists them"


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(DriverUnavailable, match="the program no-such-program is not installed"):
        LocalRunner().run(["no-such-program"], 1)
    assert LocalRunner().find("no-such-program") is None


def test_what_takes_too_long_is_asked_to_stop(tmp_path: Path) -> None:
    marker = tmp_path / "asked"
    text = f"trap 'touch {marker}; kill $!; exit 0' TERM\nsleep 1000 &\nwait\n"
    with pytest.raises(SnapshotError, match="did not end within 5 s and was stopped"):
        LocalRunner().run([script(tmp_path, text, "/bin/sh")], 5)
    assert marker.exists()


def test_what_does_not_stop_is_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap_drivers.runner._STOPPING_SECONDS", 0.1)
    text = f"trap '' TERM\necho $$ >{tmp_path / 'pid'}\nhead -c 300000 /dev/zero\nexec sleep 1000\n"
    runner = LocalRunner()
    with pytest.raises(SnapshotError, match="does not stop") as caught:
        runner.run([script(tmp_path, text, "/bin/sh")], 5)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid) and f"(process {pid})" in caught.value.message
    monkeypatch.setattr("vmsnap_drivers.runner.LATE_SECONDS", 0.1)
    with pytest.raises(SnapshotError, match=rf"\(process {pid}\) has still not ended"):
        runner.await_late()
    os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr("vmsnap_drivers.runner.LATE_SECONDS", 60)
    runner.await_late()
    assert not alive(pid)


def test_a_change_does_not_go_on_when_we_die(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = script(
        tmp_path, f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    )
    code = f"from vmsnap_drivers.runner import LocalRunner; LocalRunner().run([{command!r}], 1000, changes=True)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        eventually(lambda: pid_file.exists() and pid_file.read_text() != "", "the command", 60)
        pid = int(pid_file.read_text())
        assert alive(pid)
        process.kill()
    eventually(lambda: not alive(pid), "its end", 60)


STUBBORN = "trap '' TERM\necho $$ >{pid}\nuntil [ -e {ended} ]; do sleep 0.05; done\n"


def pid_in(path: Path) -> int:
    eventually(lambda: path.exists() and path.read_text() != "", "the command", 60)
    return int(path.read_text())


def functions_of(thread: int) -> set[str]:
    """What a thread is in."""
    return {frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames()[thread])}


def test_what_was_interrupted_and_does_not_stop_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    pid_file, ended = tmp_path / "pid", tmp_path / "ended"
    command = script(tmp_path, STUBBORN.format(pid=pid_file, ended=ended), "/bin/sh")
    before = signal.signal(signal.SIGUSR1, interrupt)
    runner = LocalRunner()
    waiter = threading.get_ident()

    def interrupt_who_waits() -> None:
        pid_in(pid_file)
        eventually(lambda: "wait" in functions_of(waiter), "the command is waited for", 60)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt_who_waits)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run([command], 1000)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    monkeypatch.setattr("vmsnap_drivers.runner.LATE_SECONDS", 0.1)
    with pytest.raises(SnapshotError, match=rf"\(process {pid_in(pid_file)}\) has still not ended"):
        runner.await_late()
    ended.touch()
    monkeypatch.setattr("vmsnap_drivers.runner.LATE_SECONDS", 60)
    runner.await_late()
    assert not alive(pid_in(pid_file))


def test_what_a_vmsnap_that_died_has_begun_and_does_not_stop_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file, ended, plan = tmp_path / "pid", tmp_path / "ended", tmp_path.name
    command = script(tmp_path, STUBBORN.format(pid=pid_file, ended=ended), "/bin/sh")
    code = "from vmsnap_drivers.runner import LocalRunner;"
    code += f"LocalRunner().run([{command!r}, '-o', 'plan={plan}'], 1000, changes=True)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        pid = pid_in(pid_file)
        process.kill()
    monkeypatch.setattr("vmsnap_drivers.runner.LATE_SECONDS", 0.1)
    LocalRunner().await_others("plan", f"{plan}x")
    with pytest.raises(SnapshotError, match=rf"\(process {pid}\) has still not ended"):
        LocalRunner().await_others("plan", plan)
    ended.touch()
    monkeypatch.setattr("vmsnap_drivers.runner.LATE_SECONDS", 60)
    LocalRunner().await_others("plan", plan)
    assert not alive(pid)


def test_lines_come_as_they_are_printed_and_the_command_ends_with_its_reader(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    text = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
    text += "print('one', flush=True); time.sleep(1000)"
    begin = time.monotonic()
    lines = LocalRunner().lines([script(tmp_path, text)], 60)
    assert next(lines) == "one\n"
    pid = int(pid_file.read_text())
    lines.close()  # type: ignore[attr-defined]
    assert not alive(pid) and time.monotonic() - begin < 60


def test_lines_of_a_command_that_fails_end_with_its_complaint(tmp_path: Path) -> None:
    lines = LocalRunner().lines([script(tmp_path, "import sys; print('one'); sys.exit('it is broken')")], 60)
    assert next(lines) == "one\n"
    with pytest.raises(SnapshotError, match="failed: it is broken"):
        next(lines)


def test_a_complaint_is_one_line_without_warnings() -> None:
    assert one_line("  WARNING: a\n  No room.\n\n  Really  not.\n") == "No room.; Really not."
    assert one_line("  WARNING: only this\n") == "WARNING: only this"
