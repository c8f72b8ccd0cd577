"""Commands on another machine, over a real SSH server: what is said is what runs, and every failure is one line."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.sshd import USER, SshServer, make_key
from tests.proxy import Proxy
from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap_drivers.runner import Output
from vmsnap_drivers.runner_ssh import SshRunner, SshSettings

pytestmark = [pytest.mark.lab, pytest.mark.sshd]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def runner_of(server: SshServer, port: int = 0, user: str = "root", **settings: str) -> SshRunner:
    known = {"known_hosts": str(server.known_hosts), "key": str(server.key), **settings}
    return SshRunner(f"ssh://{user}@127.0.0.1:{port or server.port}", SshSettings(**known))


@pytest.fixture
def runner(sshd: SshServer) -> Iterator[SshRunner]:
    made = runner_of(sshd)
    yield made
    made.close()
    made.close()


def test_words_arrive_as_they_are_and_nothing_in_them_is_a_command(runner: SshRunner) -> None:
    words = ["a b", "$HOME", "`id`", "'", '"', ";id", "*", "--", "\n", "é"]
    done = runner.run(["printf", "%s|", *words], 30)
    assert done.status == 0 and done.stdout == "".join(f"{word}|" for word in words)


def test_status_and_complaints_come_back(runner: SshRunner) -> None:
    done = runner.run(["ls", "/nowhere/at/all"], 30)
    assert done.status == 2 and "No such file" in done.stderr and done.stdout == ""
    assert len(runner.run(["head", "-c", "3000000", "/dev/zero"], 30).stdout) == 3_000_000
    assert list(runner.lines(["printf", "a\\nb"], 30)) == ["a\n", "b"]
    with pytest.raises(SnapshotError, match="failed"):
        list(runner.lines(["ls", "/nowhere/at/all"], 30))


def test_what_a_command_prints_can_be_read_while_it_runs(runner: SshRunner) -> None:
    with runner.stream(["head", "-c", "9000000", "/dev/zero"], 30) as pipe:
        taken = memoryview(bytearray(1 << 20))
        assert sum(iter(lambda: pipe.readinto(taken), 0)) == 9_000_000  # type: ignore[attr-defined]
    with (
        pytest.raises(SnapshotError, match="No such file"),
        runner.stream(["sh", "-c", "printf some; ls /nowhere/at/all"], 30) as pipe,
    ):
        assert pipe.read() == b"some"


def test_words_that_come_after_the_status_are_heard(runner: SshRunner) -> None:
    assert runner.run(["sh", "-c", "(sleep 0.5; echo late >&2) & exit 3"], 60) == Output(3, "", "late\n")
    assert runner.run(["sh", "-c", "echo word; sleep 60 & exit 3"], 10) == Output(3, "word\n", "")


def test_programs_and_devices_are_looked_for_there(runner: SshRunner) -> None:
    assert runner.find("mke2fs") and runner.find("no-such-program") is None
    assert runner.may_use(Path("/dev/null")) and not runner.may_use(Path("/dev/nowhere"))
    with pytest.raises(DriverUnavailable, match="no-such-program is not installed on ssh://root@"):
        runner.run(["no-such-program"], 30)


def test_one_that_takes_too_long_is_given_up(runner: SshRunner) -> None:
    with pytest.raises(SnapshotError, match=r"did not end within 0.5 s, and may go on"):
        runner.run(["sleep", "5"], 0.5)
    assert runner.run(["true"], 30).status == 0


def test_what_takes_too_long_can_be_waited_for(runner: SshRunner, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="and may go on"):
        runner.run(["sh", "-c", f"until test -e {tmp_path}/go; do sleep 0.1; done; touch {tmp_path}/made"], 0.5)
    assert not (tmp_path / "made").exists()
    (tmp_path / "go").touch()
    runner.await_late()
    assert (tmp_path / "made").exists()
    runner.await_late()


def test_several_run_side_by_side(runner: SshRunner) -> None:
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: said.append(runner.run(["echo", str(n)], 60).stdout)) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == [f"{n}\n" for n in range(6)]


def test_a_connection_that_is_cut_is_told_and_made_anew(sshd: SshServer) -> None:
    with Proxy(("127.0.0.1", sshd.port)) as proxy:
        known = sshd.folder / "known_too"
        known.write_text(sshd.known_hosts.read_text().replace(f":{sshd.port} ", f":{proxy.port} "))
        known.write_text(known.read_text().replace(f"]:{sshd.port}", f"]:{proxy.port}"))
        runner = runner_of(sshd, proxy.port, known_hosts=str(known))
        assert runner.run(["true"], 30).status == 0
        runs = sshd.folder / "runs"

        def cut_when_it_runs() -> None:
            while not runs.exists():
                time.sleep(0.02)
            proxy.cut_all()

        cutter = threading.Thread(target=cut_when_it_runs, daemon=True)
        cutter.start()
        begun = time.monotonic()
        with pytest.raises(SnapshotError, match="was lost during sh, which may go on"):
            runner.run(["sh", "-c", f"touch {runs}; exec sleep 60"], 60)
        assert time.monotonic() - begun < 50
        cutter.join()
        assert runner.run(["true"], 30).status == 0
        proxy.refusing = True
        proxy.cut_all()
        with pytest.raises(SnapshotError, match=r"cannot be (reached|told to run true)"):
            runner.run(["true"], 30)
        runner.close()


def test_a_machine_that_is_not_known_or_is_another_is_refused(sshd: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text("")
    with pytest.raises(SnapshotError, match=r"the host key of .* is not known"):
        runner_of(sshd, known_hosts=str(known)).run(["true"], 30)
    make_key(tmp_path / "other")
    public = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    known.write_text(f"[127.0.0.1]:{sshd.port} {public}\n")
    with pytest.raises(SnapshotError, match="HAS CHANGED"):
        runner_of(sshd, known_hosts=str(known)).run(["true"], 30)
    with pytest.raises(SnapshotError, match="does not let root in"):
        runner_of(sshd, key=str(tmp_path / "other")).run(["true"], 30)
    known.write_text("[127.0.0.1]:22 ssh-ed25519 AAA\n")
    with pytest.raises(SnapshotError, match=rf"{known} has a line that is none: .*\(mend it, or remove it\)"):
        runner_of(sshd, known_hosts=str(known)).run(["true"], 30)


def test_whoever_is_not_root_needs_sudo(sshd: SshServer) -> None:
    """Which this machine may have, without a rule for that user. Real rules are in test_iscsi_sudo."""
    with pytest.raises((DriverUnavailable, SnapshotError)) as refused:
        runner_of(sshd, user=USER).run(["true"], 30)
    said = refused.value.message
    assert "the program sudo is not installed on" in said or f"sudo on ssh://{USER}@" in said


@pytest.mark.parametrize(
    "url", ["", "ssh://", "ssh://a b@host", "ssh://host/path", "http://host", "ssh://-oProxy@host"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no address of a machine"):
        SshRunner(url, SshSettings())


def test_a_machine_that_hangs_up_is_one_line_and_nothing_else_is_printed(sshd: SshServer) -> None:
    """In a process of its own: where nobody takes log messages, Python prints them."""
    script = (
        "import sys; from vmsnap_drivers.runner_ssh import SshRunner, SshSettings\n"
        "from vmsnap.errors import SnapshotError\n"
        "try: SshRunner(sys.argv[1], SshSettings(*sys.argv[2:])).run(['true'], 5)\n"
        "except SnapshotError as e: print(e)\n"
    )
    with Proxy(("127.0.0.1", sshd.port)) as proxy:
        proxy.refusing = True
        words = [script, f"ssh://root@127.0.0.1:{proxy.port}", str(sshd.known_hosts), str(sshd.key)]
        done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1 and "cannot be reached" in done.stdout
