"""The agent's loop with real processes and simulated VMs: its clock is ours, so that a night takes seconds."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.agents import AgentHouse, eventually
from tests.stopping_job import stop_order
from tests.test_cli import BIN
from vmsnap.agent.client import AgentClient
from vmsnap.agent.house import Blueprint
from vmsnap.agent.jobs import BROKEN_OFF, CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, NewJob
from vmsnap.agent.loop import Loop
from vmsnap.agent.notices import ATTEMPTS, Notices
from vmsnap.agent.schedule import schedule_from
from vmsnap.agent.settings import AgentSettings, NoticeTarget, read_settings
from vmsnap.errors import VmsnapError
from vmsnap.locks import vm_lock


class Night:
    """A loop whose clock we set; going round until nothing is left to do."""

    def __init__(self, house: AgentHouse, settings: AgentSettings | None = None) -> None:
        self.house = house
        self.now = datetime(2026, 6, 1, 0, 0, tzinfo=UTC)
        self.said: list[str] = []
        blueprint = Blueprint(house.state, settings or AgentSettings(), repository=house.repository)
        roots = {"PYTHONPATH": str(Path(__file__).parent.parent)}
        environment = {**house.environment, "PATH": os.environ["PATH"], **roots}
        self.loop = Loop(blueprint, environment, self.said.append, clock=lambda: self.now)
        self.loop.begin()
        self.settle()

    def settle(self) -> list[Job]:
        """Go round until no job runs and none that could start is left; returns all jobs."""

        def look() -> bool:
            self.loop.turn()
            with self.house.looking() as house:
                waits = [job for job in house.jobs.open() if job.state != QUEUED or job.not_before_ns <= self.now_ns]
                return not waits and not house.jobs.unsettled()

        eventually(look, "a quiet night")
        return self.house.jobs()

    @property
    def now_ns(self) -> int:
        """The clock as the database has times."""
        return int(self.now.timestamp()) * 10**9

    def add(self, **fields: object) -> None:
        """Add a schedule whose first slot is the first from our clock on."""
        schedule = schedule_from({"name": "nightly", "cron": "0 2 * * *", "timezone": "UTC", **fields})
        with self.house.looking() as house:
            house.schedules.add(schedule)
            with house.database.transaction() as db:
                db.execute("UPDATE schedule_state SET decided_ns = ?", (self.now_ns,))

    def until_running(self, verb: str) -> Job:
        """The job of that verb, its process stopped as soon as it has taken it up; of several, one is."""

        def look() -> Job | None:
            found = [job for job in self.house.jobs(verb) if job.state == RUNNING and job.pid and is_stopped(job.pid)]
            return found[0] if found else None

        # As tests/stopping_job.py it is a product's process all the same: too quick to be stopped from outside.
        stop_order(self.house.state, verb).touch()
        with patch("vmsnap.agent.processes.JOB_MODULE", "tests.stopping_job"):
            self.loop.turn()
        return eventually(look, f"a running {verb}")


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP holds the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    made = AgentHouse(tmp_path, vms=2)
    yield made
    made.close()


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[AgentHouse]:
    made = AgentHouse(tmp_path, vms=0)
    yield made
    made.close()


def test_a_night_goes_by_schedule_with_retention_and_a_catalogue(house: AgentHouse) -> None:
    night = Night(house)
    night.add(vms=["vm*"], keep={"last": 1}, at_once=1)
    night.now += timedelta(hours=1, minutes=59)
    night.settle()
    assert not house.jobs("backup"), "too early"
    for _ in range(2):
        night.now += timedelta(minutes=2)
        night.settle()
        night.now += timedelta(days=1) - timedelta(minutes=2)
    done = house.jobs("backup", "prune")
    assert {job.state for job in done} == {DONE}, [job.message for job in done]
    assert [(job.verb, job.vm) for job in done if job.verb == "backup"] == [
        ("backup", f"vm00{n}") for n in (1, 2, 1, 2)
    ]
    backups = house.json("list")
    assert sorted(backup["vm"] for backup in backups) == ["vm001", "vm002"], "one each is kept"
    assert {tuple(backup["tags"]) for backup in backups} == {("schedule:nightly",)}
    with house.looking() as looked:
        known = looked.catalogue.page()
    assert sorted(each["backup"] for each in known) == sorted(each["backup"] for each in backups)
    assert all(house.executes(vm) for vm in ("vm001", "vm002"))
    night.loop.close()


def test_down_for_a_week_it_makes_up_with_one_run(house: AgentHouse) -> None:
    night = Night(house)
    night.add(vms=["vm001"])
    night.loop.close()
    later = Night(house)
    later.now += timedelta(days=7, hours=3)
    later.settle()
    (backup,) = house.jobs("backup")
    assert backup.state == DONE and backup.slot_ns == int(datetime(2026, 6, 8, 2, tzinfo=UTC).timestamp()) * 10**9
    assert any("missed at 2026-06-08 02:00" in line for line in later.said)
    later.loop.close()


def test_the_newest_backup_is_brought_up_by_a_schedule_that_verifies(house: AgentHouse) -> None:
    backup = house.json("backup", "vm001")["backup"]
    night = Night(house)
    night.add(verb="verify", boot=True)
    night.now += timedelta(hours=2)
    night.settle()
    (verify,) = house.jobs("verify")
    assert verify.state == DONE and verify.arguments[-1] == backup, verify.message
    with house.looking() as looked:
        assert looked.jobs.result(verify.job)["boot"]["life"]
    night.loop.close()


def test_a_job_killed_in_the_middle_is_recovered_and_tried_again(house: AgentHouse) -> None:
    night = Night(house)
    night.add(vms=["vm001"], retry_seconds=60)
    night.now += timedelta(hours=2)
    stopped = night.until_running("backup")
    assert stopped.pid
    os.kill(stopped.pid, signal.SIGKILL)
    night.settle()
    broken, retry = house.jobs("backup")
    assert (broken.state, retry.state, retry.attempt) == (BROKEN_OFF, QUEUED, 2) and "SIGKILL" in broken.message
    assert [job.state for job in house.jobs("recover")] == [DONE, DONE], "at the begin, and after that"
    night.now += timedelta(seconds=59)
    night.settle()
    assert house.jobs("backup")[1].state == QUEUED
    night.now += timedelta(seconds=2)
    night.settle()
    assert house.jobs("backup")[1].state == DONE
    assert len(house.json("list")) == 1 and house.executes()
    night.loop.close()


def test_a_failure_that_lasts_is_tried_as_often_as_was_said_and_told_once_each(house: AgentHouse) -> None:
    targets = {"pager": NoticeTarget(command="/bin/false"), "log": NoticeTarget(command="/bin/true", on="all")}
    night = Night(house, AgentSettings(notify=targets))
    night.add(vms=["vm002"], retries=2, retry_seconds=60)
    night.now += timedelta(hours=2)
    with vm_lock(house.state, "vm002", "somebody else's work"):
        for _ in range(4):
            night.settle()
            night.now += timedelta(minutes=10)
    tries = house.jobs("backup")
    assert [(job.state, job.attempt) for job in tries] == [(FAILED, 1), (FAILED, 2), (FAILED, 3)]
    assert all("somebody else's work" in job.message and job.exit_code == 5 for job in tries)
    with house.looking() as looked:
        told = looked.database.rows("SELECT target, body FROM notice ORDER BY notice")
    assert [(row["target"], json.loads(row["body"])["job"]) for row in told] == [
        (target, job.job) for job in tries for target in ("pager", "log")
    ]
    night.loop.close()


def test_a_queued_job_is_taken_back_and_a_running_one_stops_and_cleans_up(house: AgentHouse) -> None:
    night = Night(house)
    with house.looking() as looked:
        waits, _ = looked.jobs.add(NewJob(verb="backup", arguments=("backup", "vm001"), not_before_ns=2**62))
        assert looked.jobs.cancel_queued(waits.job, "not wanted") and not looked.jobs.cancel_queued(waits.job, "twice")
        looked.jobs.add(NewJob(verb="backup", arguments=("backup", "vm001"), vm="vm001", repository=house.repository))
    running = night.until_running("backup")
    night.loop.cancel(running)
    night.loop.cancel(running)
    assert running.pid
    os.kill(running.pid, signal.SIGCONT)
    night.settle()
    assert [job.state for job in house.jobs("backup")] == [CANCELLED, CANCELLED], house.jobs("backup")
    assert house.json("list") == [] and house.executes()
    night.loop.close()


def test_a_process_that_cannot_start_fails_its_job_and_nothing_else(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = Night(house)
    with house.looking() as looked:
        new = NewJob(verb="backup", arguments=("backup", "vm001"), vm="vm001", repository=house.repository)
        looked.jobs.add(new)
        monkeypatch.setattr("vmsnap.agent.processes.JOB_MODULE", "vmsnap.nothing_of_that_name")
        night.settle()
        monkeypatch.undo()
        looked.jobs.add(new)
    night.settle()
    first, second = house.jobs("backup")
    assert first.state == FAILED and "nothing_of_that_name" in first.message and second.state == DONE
    assert sorted(path.name for path in (house.state / "agent").iterdir()) == []
    night.loop.close()


def test_two_processes_never_carry_out_one_job(bare: AgentHouse) -> None:
    with bare.looking() as one, bare.looking() as other:
        job, _ = one.jobs.add(NewJob(verb="doctor", arguments=("doctor",)))
        assert one.jobs.starting(job.job) and not other.jobs.starting(job.job)
        assert one.jobs.take_up(job.job, os.getpid()) and not other.jobs.take_up(job.job, os.getpid())
        assert one.jobs.end(job.job, DONE) and not other.jobs.end(job.job, FAILED)
        assert one.jobs.settle(job.job, [NewJob(verb="gc", arguments=("gc",))], []) != []
        assert other.jobs.settle(job.job, [NewJob(verb="gc", arguments=("gc",))], []) == []
        assert [each.verb for each in one.jobs.page()] == ["gc", "doctor"]


def test_one_slot_is_entered_once_whoever_looks(bare: AgentHouse) -> None:
    with bare.looking() as one, bare.looking() as other:
        one.schedules.add(schedule_from({"name": "nightly", "cron": "0 2 * * *"}))
        before = one.schedules.get("nightly").decided_ns
        new = [NewJob(verb="doctor", arguments=("doctor",))]
        assert len(one.schedules.enter_run("nightly", before + 1, before, new)) == 1
        assert other.schedules.enter_run("nightly", before + 1, before, new) == []


def test_a_sleeping_loop_wakes_when_somebody_asks(bare: AgentHouse) -> None:
    turns: list[float] = []
    thread_done = threading.Event()

    def run() -> None:
        made = Loop(Blueprint(bare.state, AgentSettings()), bare.environment, lambda _: None)
        stops.append(made)
        made.run(lambda: turns.append(0.0))
        made.close()
        thread_done.set()

    stops: list[Loop] = []
    threading.Thread(target=run, daemon=True).start()
    eventually(lambda: turns, "a turn")
    stops[0].stop()
    assert thread_done.wait(30)


def test_a_schedule_that_cannot_be_used_any_more_holds_up_no_other_and_can_be_removed(house: AgentHouse) -> None:
    night = Night(house)
    night.add(vms=["vm001"])
    night.add(name="lost", vms=["vm002"])
    with house.looking() as looked, looked.database.transaction() as db:
        db.execute("UPDATE schedule SET data = replace(data, 'UTC', 'Mars/Olympus') WHERE schedule = 'lost'")
    night.now += timedelta(hours=2)
    night.settle()
    assert [job.vm for job in house.jobs("backup")] == ["vm001"]
    assert len([line for line in night.said if "lost cannot be used" in line]) == 1
    told = house.run("schedule", "list", "--json")
    assert "Mars/Olympus" in told.stderr and [each["name"] for each in json.loads(told.stdout)] == ["nightly"]
    house.json("schedule", "remove", "lost")
    assert house.run("schedule", "list").stderr == ""
    night.loop.close()


def test_a_database_that_cannot_be_used_for_a_while_does_not_end_the_agent(
    bare: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    loop = Loop(Blueprint(bare.state, AgentSettings()), bare.environment, said.append)
    turn, turns = loop.turn, iter([True, False])

    def broken() -> datetime | None:
        if next(turns):
            raise VmsnapError("the state database is locked")
        loop.stop()
        return turn()

    monkeypatch.setattr(loop, "turn", broken)
    monkeypatch.setattr("vmsnap.agent.loop.LONGEST_SLEEP_SECONDS", 0.1)
    loop.run(lambda: None)
    loop.close()
    assert [line for line in said if "locked" in line]


# -- notices


class _Hook(BaseHTTPRequestHandler):
    answers: list[int] = []
    seen: list[tuple[str, bytes]] = []

    def do_POST(self) -> None:
        """Keep what came, and answer as told."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.headers.get("X-Vmsnap-Signature", ""), body))
        self.send_response(self.answers.pop(0) if self.answers else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hook() -> Iterator[str]:
    _Hook.answers, _Hook.seen = [], []
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/told"
    server.shutdown()
    server.server_close()
    thread.join(10)


def _put(house: AgentHouse, target: str) -> None:
    with house.looking() as looked:
        job, _ = looked.jobs.add(NewJob(verb="doctor", arguments=("doctor",)))
        looked.jobs.end(job.job, FAILED)
        looked.jobs.settle(
            job.job, [], [(target, '{"job": 1, "verb": "doctor", "vm": "", "state": "failed", "repository": ""}')]
        )


def _due_again(house: AgentHouse) -> None:
    with house.looking() as looked, looked.database.transaction() as db:
        db.execute("UPDATE notice SET next_ns = 0")


def test_a_webhook_that_fails_is_asked_again_later_and_gets_a_signature(
    bare: AgentHouse, hook: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    _Hook.answers = [500, 302, 200]
    _put(bare, "hook")
    said: list[str] = []
    with bare.looking() as looked:
        notices = Notices(looked.database, {"hook": NoticeTarget(webhook=hook, secret_file=secret)}, said.append)
        due = notices.deliver()
        assert due is not None and 20 < due <= 30 and len(_Hook.seen) == 1
        _due_again(bare)
        due = notices.deliver()
        assert due is not None and 50 < due <= 60, "twice as long, and a redirection is not followed"
        _due_again(bare)
        assert notices.deliver() is None and notices.waiting() == 0
    assert len(_Hook.seen) == 3 and "500" in said[0] and "hush" not in " ".join(said)
    for signature, body in _Hook.seen:
        assert signature == f"sha256={hmac.new(b'hush', body, hashlib.sha256).hexdigest()}"


def test_a_command_gets_the_notice_on_its_input_and_one_that_never_works_is_given_up(
    bare: AgentHouse, tmp_path: Path
) -> None:
    script, heard = tmp_path / "told", tmp_path / "heard"
    script.write_text(f"#!/bin/sh\ncat >{heard}\n")
    script.chmod(0o700)
    targets = {"good": NoticeTarget(command=str(script)), "bad": NoticeTarget(command="/bin/false")}
    _put(bare, "good")
    _put(bare, "bad")
    _put(bare, "gone")
    said: list[str] = []
    with bare.looking() as looked:
        notices = Notices(looked.database, targets, said.append)
        for _ in range(ATTEMPTS):
            notices.deliver()
            _due_again(bare)
        assert notices.waiting() == 0
    assert json.loads(heard.read_text())["verb"] == "doctor"
    assert [line for line in said if "given up" in line and "bad" in line] and any("gone" in line for line in said)


def test_an_e_mail_says_in_its_subject_what_became_of_what(bare: AgentHouse) -> None:
    heard: list[str] = []

    class Mail(socketserver.StreamRequestHandler):
        """As much of SMTP (RFC 5321) as takes one message."""

        def handle(self) -> None:
            """One message."""
            self.wfile.write(b"220 here\r\n")
            while line := self.rfile.readline():
                word = line.split()[0].upper() if line.split() else b""
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    while (line := self.rfile.readline()) not in (b".\r\n", b""):
                        heard.append(line.decode().rstrip())
                self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
                if word == b"QUIT":
                    return

    with socketserver.TCPServer(("127.0.0.1", 0), Mail) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        target = NoticeTarget(email="ops@example.com", smtp=f"127.0.0.1:{server.server_address[1]}")
        _put(bare, "mail")
        with bare.looking() as looked:
            assert Notices(looked.database, {"mail": target}, lambda _: None).deliver() is None
        server.shutdown()
        thread.join(10)
    assert "Subject: vmsnap: doctor of this host: failed" in heard and "To: ops@example.com" in heard


# -- the service


def test_an_agent_that_is_killed_loses_no_job_and_the_next_one_finds_it(tmp_path: Path) -> None:
    house = AgentHouse(tmp_path)
    try:
        client = house.start_agent()
        job = client.post("/jobs/backup", {"vm": "vm001"})["job"]

        def running() -> int | None:
            with house.looking() as looked:
                found = looked.jobs.get(job)
            assert not found.ended, found
            return found.pid if found.state == RUNNING else None

        pid = eventually(running, "the backup")
        os.kill(pid, signal.SIGSTOP)
        house.stop_agent(signal.SIGKILL)
        client = house.start_agent()
        assert client.get(f"/jobs/{job}")["state"] == "running"
        os.kill(pid, signal.SIGCONT)
        assert house.ended(job).state == DONE
        house.quiet()
        assert [each["backup"] for each in client.get("/backups")["items"]] == [
            each["backup"] for each in house.json("list")
        ]
        assert house.stop_agent() == 0, house.log.read_text()
    finally:
        house.close()


def test_a_second_agent_for_the_same_state_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    house = AgentHouse(tmp_path, vms=0)
    try:
        client = house.start_agent()
        assert "already" in house.error(5, "agent")
        assert client.get("/health")["status"] == "ok"
        assert house.stop_agent(signal.SIGINT) == 0
    finally:
        house.close()


def test_systemd_hears_of_readiness_and_of_each_turn(tmp_path: Path) -> None:
    house = AgentHouse(tmp_path, vms=0)
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))
        heard.settimeout(30)
        try:
            house.start_agent(NOTIFY_SOCKET=str(path))
            texts = [heard.recv(100) for _ in range(2)]
            assert house.stop_agent() == 0
            while select.select([heard], [], [], 0)[0]:
                texts.append(heard.recv(100))
        finally:
            house.close()
    assert texts[:2] == [b"READY=1", b"WATCHDOG=1"] and texts[-1] == b"STOPPING=1"
    assert not house.socket.exists()


def test_an_agent_stops_in_order_though_somebody_watches(tmp_path: Path) -> None:
    house = AgentHouse(tmp_path, vms=0)
    try:
        client = house.start_agent()
        with client._answer("GET", "/events", None, {}) as stream:
            assert stream.readline().startswith(b"event: jobs")
            assert house.stop_agent() == 0
        assert "stopping" in house.log.read_text()
    finally:
        house.close()


_AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_socket_that_systemd_has_opened_is_served_and_left_there(tmp_path: Path) -> None:
    house = AgentHouse(tmp_path, vms=0)
    path = tmp_path / "passed.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        words = [sys.executable, "-c", _AS_SYSTEMD, str(listening.fileno()), str(BIN / "vmsnap"), "agent"]
        process = subprocess.Popen(words, env=house.environment, pass_fds=[listening.fileno()], stderr=subprocess.PIPE)
        try:
            client = AgentClient(f"unix:{path}")
            assert client.get("/health")["status"] == "ok", "one waits in the queue until it is answered"
            process.terminate()
            _, said = process.communicate(timeout=90)
            assert process.returncode == 0 and b"passed.sock" in said
        finally:
            process.kill()
            house.close()
    assert path.exists() and not house.socket.exists()


def test_settings_that_are_wrong_are_refused_before_anything_is_served(tmp_path: Path) -> None:
    for table, names_it in (
        ({"jobs": 2}, "jobs"),
        ({"jobs_at_once": 0}, "jobs_at_once"),
        ({"jobs_at_once": "2"}, "jobs_at_once"),
        ({"listen": "0.0.0.0:8443"}, "TLS"),
        ({"listen": "8443", "certificate": "/c", "key": "/k"}, "HOST:PORT"),
        ({"socket": "relative"}, "absolute"),
        ({"repositories": ["s3://u:p@h/b"]}, "password"),
        ({"notify": {"a": {"webhook": "ftp://x"}}}, "webhook"),
        ({"notify": {"a": {}}}, "one of"),
        ({"notify": {"a": {"command": "x", "email": "a@b"}}}, "one of"),
        ({"notify": {"a": {"command": "'x"}}}, "command"),
        ({"notify": {"a": {"email": "a b@c"}}}, "e-mail"),
        ({"notify": {"a": {"webhok": "https://x"}}}, "webhok"),
        ({"notify": {"a": {"command": "x", "on": "never"}}}, "on must be"),
    ):
        with pytest.raises(VmsnapError) as told:
            read_settings(table)
        assert names_it in str(told.value), table
    assert read_settings({"notify": {"a": {"command": "x y"}}}).notify["a"].command == "x y"
