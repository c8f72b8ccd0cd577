"""The API: who may do what, what it refuses, and how much it does for a page of a hundred thousand."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import Phase, given, settings
from schemathesis import openapi
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.agent_crowd import BACKUPS_EACH, JOBS, VMS, fill
from tests.agents import AgentHouse, eventually
from tests.browser import make_certificate
from vmsnap.agent.api.access import LARGEST_BODY_BYTES, Door
from vmsnap.agent.api.app import create_app
from vmsnap.agent.api.context import Context
from vmsnap.agent.api.verbs import VERBS
from vmsnap.agent.client import AgentClient
from vmsnap.agent.house import Blueprint, House
from vmsnap.agent.jobs import NewJob
from vmsnap.agent.metrics import metrics_text
from vmsnap.agent.settings import AgentSettings
from vmsnap.agent.tokens import ROLES
from vmsnap.agent.vmpage import timeline_page, vm_page
from vmsnap.errors import Busy, NotFound, UsageError, VmsnapError

TRUSTED = Door("http", frozenset({"localhost", "testserver"}), trusted=True)
GUARDED = Door("https", frozenset({"localhost", "agent.example"}), trusted=False)
JSON = {"Content-Type": "application/json"}


class Served:
    """The application without a server: a state folder, nothing that carries jobs out."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        blueprint = Blueprint(folder, AgentSettings(repositories=("s3://far/copies",)), repository="/srv/backups")
        self.woken: list[bool] = []
        self.context = Context(blueprint, lambda: self.woken.append(True), lambda _: None, lambda: 1.0)
        self.trusted = create_app(self.context, TRUSTED)
        self.guarded = create_app(self.context, GUARDED)
        self.house = House(blueprint)

    def client(self, token: str = "", *, trusted: bool = False) -> httpx.AsyncClient:
        """A client of one of the doors."""
        door, url = (self.trusted, "http://localhost") if trusted else (self.guarded, "https://localhost")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url=url, headers=headers)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path / "state")
    yield made
    made.house.close()


def ask(client: httpx.AsyncClient, method: str, path: str, **how: Any) -> httpx.Response:
    import asyncio

    async def go() -> httpx.Response:
        return await client.request(method, path, **how)

    return asyncio.run(go())


# -- everything that OpenAPI allows, and what it does not


def test_whatever_is_asked_there_is_no_server_error_and_the_answers_are_as_documented(
    served: Served, counted: Callable[[str], None]
) -> None:
    served.house.tokens.add("old", "read", 1)
    for number in range(3):
        served.house.jobs.add(NewJob(verb="backup", arguments=("backup", f"vm{number}"), vm=f"vm{number}"))
    document = ask(served.client(trusted=True), "GET", "/api/v1/openapi.json").json()
    assert len(document["paths"]) > 25 and document["openapi"].startswith("3.1")
    # Streams end when the agent does.
    served.context.stopping.set()
    schema = openapi.from_asgi("/api/v1/openapi.json", served.trusted)
    statuses: dict[str, set[int]] = {}
    # It makes tokens up too, which are refused before anything else.
    headers = {"Authorization": f"Bearer {served.house.tokens.add('asker', 'admin')}"}

    def ask_one(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
        def run(case: Any) -> None:
            answer = case.call(headers=headers)
            statuses.setdefault(operation.label, set()).add(answer.status_code)
            case.validate_response(answer, checks=[not_a_server_error, response_schema_conformance])
            assert "Traceback" not in answer.text

        run()

    for operation in schema.get_all_operations():
        ask_one(operation.ok())
    assert len(statuses) > 30
    accepted = {label for label, codes in statuses.items() if codes & {200, 201, 202, 204}}
    assert len(accepted) > 20, f"they are not all refused before anything is done: {statuses}"
    counted(f"{len(statuses)} operations, {len(accepted)} of them accepted something")


# -- who may do what

LUN = "iscsi://10.0.0.5:3260/iqn.2009-12.com.example:copy/1"
BODIES: dict[str, dict[str, Any]] = {
    "backup": {"vm": "vm001"},
    "restore": {"backup": "vm001-20260101T000000Z-123456", "name": "copy"},
    "verify": {"backup": "vm001-20260101T000000Z-123456", "boot": True},
    "consolidate": {"backup": "vm001-20260101T000000Z-123456", "target": "/srv/clean"},
    "export": {"backup": "vm001-20260101T000000Z-123456", "output": "/srv/out"},
    "failover": {"vm": "vm001"},
    "duplicate-discard": {"duplicate": "bk-0123456789"},
    "prune": {"keep_last": 1, "dry_run": False},
    "forget": {"backups": ["vm001-20260101T000000Z-123456"]},
    "gc": {},
    "check": {"read_data": True},
    "repair": {"dry_run": False, "forget_damaged": True},
    "copy": {"to": "s3://far/copies", "backups": ["vm001-20260101T000000Z-123456"]},
    "refresh": {"everything": True},
    "doctor": {"vm": "vm001"},
    "recover": {},
    "vm-add": {"vm": "vm002", "hypervisor": "qemu", "options": {"qmp": "/run/vm002.qmp"}},
    "vm-remove": {"vm": "vm002"},
    "vm-show": {"vm": "vm002"},
    "duplicate-list": {},
    "strays": {"remove": ["bk-0123456789"]},
    "log": {"vm": "vm002", "since_seconds": 3600, "failed": True},
    "drivers": {},
    "drivers-show": {"driver": "qemu"},
    "init": {"encryption": "none"},
    "key-list": {},
    "key-remove": {"key": "0123456789abcdef"},
    "tags": {},
}
OPERATORS = {"backup", "restore", "verify", "check", "refresh", "doctor", "tags", "log", "drivers", "drivers-show"}
OPERATORS |= {"vm-show", "duplicate-list", "key-list"}
ASKED: list[tuple[str, str, dict[str, Any] | None, str]] = [
    ("GET", "/api/v1/summary", None, "read"),
    ("GET", "/api/v1/vms", None, "read"),
    ("GET", "/api/v1/vms/vm001", None, "read"),
    ("GET", "/api/v1/timeline", None, "read"),
    ("GET", "/api/v1/backups", None, "read"),
    ("GET", "/api/v1/backups/x", None, "read"),
    ("GET", "/api/v1/jobs", None, "read"),
    ("GET", "/api/v1/jobs/1", None, "read"),
    ("GET", "/api/v1/jobs/1/events", None, "read"),
    ("GET", "/api/v1/events", None, "read"),
    ("GET", "/api/v1/schedules", None, "read"),
    ("GET", "/api/v1/schedules/x", None, "read"),
    ("GET", "/metrics", None, "read"),
    *(
        ("POST", f"/api/v1/jobs/{verb}", body, "operate" if verb in OPERATORS else "admin")
        for verb, body in BODIES.items()
    ),
    ("POST", "/api/v1/jobs/prune", {"keep_last": 1}, "operate"),
    ("POST", "/api/v1/jobs/restore", {**BODIES["restore"], "target": "/etc"}, "admin"),
    ("POST", "/api/v1/jobs/restore", {**BODIES["restore"], "onto": {"": LUN}}, "admin"),
    ("POST", "/api/v1/jobs/restore", {**BODIES["restore"], "options": {"qmp": "/x"}}, "admin"),
    ("POST", "/api/v1/jobs/restore", {**BODIES["restore"], "isolated": False}, "admin"),
    ("POST", "/api/v1/jobs/verify", {**BODIES["verify"], "options": {"qmp": "/x"}}, "admin"),
    ("POST", "/api/v1/jobs/backup", {"vm": "vm001", "accept_unencrypted": True}, "admin"),
    ("POST", "/api/v1/jobs/strays", {}, "operate"),
    ("POST", "/api/v1/jobs/1/cancel", {}, "operate"),
    ("PUT", "/api/v1/schedules/x/paused", {"paused": True}, "operate"),
    ("POST", "/api/v1/schedules/x/run", {}, "operate"),
    ("POST", "/api/v1/schedules", {"name": "n", "cron": "0 2 * * *"}, "admin"),
    ("DELETE", "/api/v1/schedules/x", None, "admin"),
    ("GET", "/api/v1/tokens", None, "admin"),
    ("POST", "/api/v1/tokens", {"name": "t", "role": "read"}, "admin"),
    ("DELETE", "/api/v1/tokens/x", None, "admin"),
]


def test_every_route_needs_a_token_of_its_role_or_a_higher_one(served: Served) -> None:
    served.context.stopping.set()
    tokens = {role: served.house.tokens.add(f"a-{role}", role) for role in ROLES}
    removed = served.house.tokens.add("removed", "admin")
    served.house.tokens.remove("removed")
    expired = served.house.tokens.add("expired", "admin", 1)
    with served.house.database.transaction() as db:
        db.execute("UPDATE token SET expires_ns = ? WHERE name = 'expired'", (time.time_ns() - 1,))
    served.house.jobs.add(NewJob(verb="backup", arguments=("backup", "a"), vm="a"))
    document = ask(served.client(trusted=True), "GET", "/api/v1/openapi.json").json()
    routes = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert len(ASKED) >= len(routes) - 1, "every route but /health is asked below"
    for method, path, body, role in ASKED:
        for bad in ("", "vmsnap_wrong", removed, expired, tokens["read"][:-1], "é"):
            headers = {"Authorization": f"Bearer {bad}".encode()} if bad else {}
            answer = ask(served.client(), method, path, json=body, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, bad)
        for has, token in tokens.items():
            answer = ask(served.client(token), method, path, json=body)
            enough = ROLES.index(has) >= ROLES.index(role)
            assert (answer.status_code != 403) == enough, (path, body, has, answer.text)
            assert answer.status_code < 500
    basic = ask(served.client(), "GET", "/api/v1/vms", headers={"Authorization": f"Basic {tokens['admin']}"})
    assert basic.status_code == 401
    assert ask(served.client(), "GET", "/api/v1/health").status_code == 200


def test_an_operator_stops_what_operators_start_and_nothing_else(served: Served) -> None:
    operator = served.house.tokens.add("op", "operate")
    backup, _ = served.house.jobs.add(NewJob(verb="backup", arguments=("backup", "a"), vm="a"))
    prune, _ = served.house.jobs.add(NewJob(verb="prune", arguments=("prune",)))
    assert ask(served.client(operator), "POST", f"/api/v1/jobs/{prune.job}/cancel", json={}).status_code == 403
    assert (
        ask(served.client(operator), "POST", f"/api/v1/jobs/{backup.job}/cancel", json={}).json()["state"]
        == "cancelled"
    )
    assert ask(served.client(operator), "POST", f"/api/v1/jobs/{backup.job}/cancel", json={}).status_code == 409


def test_tokens_are_kept_as_digests_alone_and_shown_once(served: Served) -> None:
    made = ask(served.client(trusted=True), "POST", "/api/v1/tokens", json={"name": "once", "role": "read"}).json()
    assert served.house.tokens.find(made["token"]) is not None
    listed = ask(served.client(trusted=True), "GET", "/api/v1/tokens")
    assert made["token"] not in listed.text
    served.house.database.rows("PRAGMA wal_checkpoint(FULL)")
    for path in served.context.blueprint.state_dir.iterdir():
        if path.is_file():
            assert made["token"].encode() not in path.read_bytes(), path


# -- other sites, and other tricks


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, 202),
        ({"Host": "127.0.0.1:8080", "Origin": "http://127.0.0.1:8080"}, 202),
        ({"Host": "[::1]:8080"}, 202),
    ],
)
def test_another_sites_page_starts_nothing_even_where_no_token_is_needed(
    served: Served, headers: dict[str, str], status: int
) -> None:
    answer = ask(
        served.client(trusted=True),
        "POST",
        "/api/v1/jobs/backup",
        content='{"vm": "vm001"}',
        headers={**JSON, **headers},
    )
    assert answer.status_code == status, answer.text
    assert bool(served.house.jobs.open()) == (status == 202) == bool(served.woken)
    assert "access-control-allow-origin" not in answer.headers


def test_another_site_may_link_to_the_page_and_reads_nothing(served: Served) -> None:
    from_outside = {"Sec-Fetch-Site": "cross-site"}
    navigated = {**from_outside, "Sec-Fetch-Mode": "navigate"}
    assert ask(served.client(trusted=True), "GET", "/", headers=navigated).status_code == 200
    assert ask(served.client(trusted=True), "GET", "/api/v1/vms", headers=from_outside).status_code == 403
    assert (
        ask(
            served.client(trusted=True), "OPTIONS", "/api/v1/jobs/gc", headers={"Origin": "https://evil.example"}
        ).status_code
        == 403
    )


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/app.js/../../__init__.py",
        "/..\\..\\etc\\passwd",
        "//etc/passwd",
        "/api.py",
        "/index.html%00.js",
        "/.git/config",
        "/units/vmsnap-agent.service",
        "/api/v1/../../etc/passwd",
        "/api/v1/backups/..%2f..%2f..%2fetc%2fpasswd",
        "/api/v1/vms/%00",
        "/api/v1/jobs/1%20OR%201=1",
        "/api/v1/vms/" + "a" * 5000,
    ],
)
def test_no_path_leads_out_of_the_page(served: Served, path: str) -> None:
    answer = ask(served.client(trusted=True), "GET", path)
    assert answer.status_code in (404, 422), (path, answer.status_code)
    assert "root:" not in answer.text and "import" not in answer.text


def test_the_page_comes_with_a_policy_that_lets_nothing_from_elsewhere_in(served: Served) -> None:
    for path in ("/", "/app.js", "/style.css", "/icon.svg", "/nothing", "/api/v1/vms"):
        answer = ask(served.client(), "GET", path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert ("no-store" in answer.headers["cache-control"]) == path.startswith("/api")
    web = Path(__file__).parent.parent / "vmsnap" / "agent" / "web"
    texts = "".join(path.read_text() for path in web.iterdir())
    assert "innerHTML" not in texts and "style=" not in texts and "onclick=" not in texts
    outside = [word for word in texts.split('"') if word.startswith(("http:", "https:"))]
    assert outside == ["http://www.w3.org/2000/svg"] * 2, "nothing is fetched from elsewhere"


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(served: Served) -> None:
    big = b'{"vm": "' + b"a" * LARGEST_BODY_BYTES + b'"}'
    assert ask(served.client(trusted=True), "POST", "/api/v1/jobs/backup", content=big, headers=JSON).status_code == 413

    async def pieces() -> Any:
        for begin in range(0, len(big), 1 << 16):
            yield big[begin : begin + (1 << 16)]

    answer = ask(served.client(trusted=True), "POST", "/api/v1/jobs/backup", content=pieces(), headers=JSON)
    assert 400 <= answer.status_code < 500 and not served.house.jobs.open()


def test_a_database_that_cannot_be_read_is_told_in_one_line(served: Served, tmp_path: Path) -> None:
    with served.house.database.transaction() as db:
        db.execute("ALTER TABLE catalogue RENAME TO elsewhere")
    answer = ask(served.client(trusted=True), "GET", "/api/v1/backups")
    assert answer.status_code == 503 and "cannot be read" in answer.json()["error"] and "Traceback" not in answer.text


# -- what a request becomes


@pytest.mark.parametrize("model", VERBS, ids=lambda model: model.verb)
def test_every_request_becomes_a_command_line_that_the_command_line_takes(model: Any) -> None:
    from vmsnap.cli.main import vmsnap

    verb = model.verb.removeprefix("agent-")
    bodies = [BODIES[verb]]
    if verb == "backup":
        bodies.append(
            {"vm": "a", "mode": "consistent", "tags": ["x y", "é"], "keep_duplicate": True, "keep_for_seconds": 60}
        )
    if verb == "restore":
        bodies.append(
            {**BODIES[verb], "run": True, "target": "/srv/a b", "options": {"qmp": "/a=b"}, "accept_loss": True}
        )
        bodies.append({**BODIES[verb], "onto": {"a b": LUN}})
        bodies.append({**BODIES[verb], "onto": {"": LUN}})
    if verb == "prune":
        bodies.append(
            {
                **{f"keep_{rule}": 2 for rule in ("last", "hourly", "yearly")},
                "keep_tags": ["a"],
                "vm": "b",
                "tags": ["c"],
            }
        )
    for body in bodies:
        words = list(model(**body).arguments())
        command, context = vmsnap, None
        while hasattr(command, "resolve_command") and words:
            context = vmsnap.make_context("vmsnap", [], resilient_parsing=True) if context is None else context
            _, found, words = command.resolve_command(context, words)
            assert found is not None, words
            command = found
        parsed = command.make_context(verb, words, parent=context)
        given = {str(value) for value in parsed.params.values()}
        named = next(value for value in [*body.values(), ""] if isinstance(value, str))
        assert not named or any(named in value for value in given), (parsed.params, body)


@pytest.mark.parametrize("name", ["--help", "-r", "a b", "a;b", "../a", "a/b", "", "a\nb", "é", "a" * 65])
def test_a_name_that_could_be_something_else_is_refused(served: Served, name: str) -> None:
    for verb, key in (("backup", "vm"), ("failover", "vm"), ("vm-remove", "vm"), ("restore", "name")):
        answer = ask(served.client(trusted=True), "POST", f"/api/v1/jobs/{verb}", json={**BODIES[verb], key: name})
        assert answer.status_code == 422, (verb, name)
    assert not served.house.jobs.open()


def test_jobs_use_the_repositories_that_the_agent_works_with_and_no_others(served: Served) -> None:
    def status(url: str) -> int:
        body = {"vm": "vm001", "repository": url}
        return ask(served.client(trusted=True), "POST", "/api/v1/jobs/backup", json=body).status_code

    assert status("s3://attacker/bucket") == 400 and status("/etc") == 400 and status("--config=/x") == 422
    assert status("s3://far/copies") == 202
    far = {"to": "s3://attacker/bucket"}
    assert ask(served.client(trusted=True), "POST", "/api/v1/jobs/copy", json=far).status_code == 400
    schedule = {"name": "n", "cron": "0 2 * * *", "repository": "/srv/second"}
    assert ask(served.client(trusted=True), "POST", "/api/v1/schedules", json=schedule).status_code == 201
    assert status("/srv/second") == 202
    secret = {**schedule, "name": "m", "repository": "s3://user:secret@host/b"}
    answer = ask(served.client(trusted=True), "POST", "/api/v1/schedules", json=secret)
    assert answer.status_code == 400 and "secret@" not in answer.text


# -- asking twice


def test_asking_again_with_the_same_key_gives_the_same_job(served: Served) -> None:
    mine, yours = served.house.tokens.add("mine", "operate"), served.house.tokens.add("yours", "operate")

    def job(token: str, key: str, vm: str = "vm001") -> httpx.Response:
        headers = {"Idempotency-Key": key}
        return ask(served.client(token), "POST", "/api/v1/jobs/backup", json={"vm": vm}, headers=headers)

    first = job(mine, "k1")
    again = job(mine, "k1")
    assert (first.status_code, again.status_code) == (202, 200) and first.json()["job"] == again.json()["job"]
    assert first.headers["location"] == f"/api/v1/jobs/{first.json()['job']}"
    assert job(mine, "k1", "vm002").status_code == 400, "the same key for something else"
    assert job(yours, "k1").json()["job"] != first.json()["job"], "keys are each caller's own"
    assert job(mine, "k2").json()["job"] != first.json()["job"]


def test_of_many_who_ask_at_once_with_one_key_all_get_one_job(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def add(_: int) -> int:
        house = House(served.context.blueprint)
        try:
            return house.jobs.add(NewJob(verb="gc", arguments=("gc",), key="one"))[0].job
        finally:
            house.close()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(add, range(16)))) == 1


# -- ten thousand VMs, a hundred thousand backups


class Work:
    """Counts the steps of SQLite's virtual machine, which do not depend on how fast or busy this one is."""

    def __init__(self, house: House) -> None:
        self.thousands = 0
        house.database._connection.set_progress_handler(self._count, 1000)

    def _count(self) -> int:
        self.thousands += 1
        return 0

    def of(self, look: Callable[[], Any]) -> int:
        """The steps that `look` takes."""
        self.thousands = 0
        look()
        return self.thousands * 1000


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("crowd")
    house = House(Blueprint(folder, AgentSettings(), repository="/r"))
    fill(house)
    yield house
    house.close()


def test_a_page_takes_little_work_however_much_there_is_and_wherever_it_begins(
    crowd: House, counted: Callable[[str], None]
) -> None:
    work = Work(crowd)
    looks: dict[str, Callable[[], Any]] = {
        "VMs, first": lambda: vm_page(crowd, limit=100),
        "VMs, last": lambda: vm_page(crowd, after="vm09899", limit=100),
        "timeline, middle": lambda: timeline_page(crowd, "2026-01-02T00:00:00Z", after="vm05000", limit=50),
        "backups, first": lambda: crowd.catalogue.page(limit=500),
        "backups, middle": lambda: crowd.catalogue.page(before=("2026-01-05T12:00:00Z", ""), limit=500),
        "backups, last": lambda: crowd.catalogue.page(before=("2026-01-01T00:10:00Z", ""), limit=500),
        "backups of one VM": lambda: crowd.catalogue.page(vm="vm05000", limit=500),
        "one backup": lambda: crowd.catalogue.get("vm09999-20260110T"),
        "jobs, first": lambda: crowd.jobs.page(limit=500),
        "jobs, middle": lambda: crowd.jobs.page(before=JOBS // 2, limit=500),
        "jobs of one VM": lambda: crowd.jobs.page(vm="vm05000", limit=500),
        "failed jobs": lambda: crowd.jobs.page(state="failed", limit=500),
        "open jobs": crowd.jobs.open,
        "unsettled jobs": crowd.jobs.unsettled,
    }
    steps = {name: work.of(look) for name, look in looks.items()}
    assert len(looks["VMs, first"]()) == 100 and len(looks["backups, middle"]()) == 500
    assert max(steps.values()) < 60_000, steps
    assert [len(row["backups"]) for row in looks["timeline, middle"]()] == [BACKUPS_EACH - 1] * 50
    find = work.of(lambda: vm_page(crowd, match="9999", limit=100))
    assert find < 200_000, "a look at each name, no more"
    counted(f"steps of SQLite for a page: {max(steps.values())} at most; to find a name among {VMS}: {find}")


def test_metrics_of_ten_thousand_vms_read_one_backup_of_each(crowd: House) -> None:
    text = metrics_text(crowd).decode()
    assert text.count("vmsnap_last_backup_timestamp_seconds{") == VMS
    assert f'vmsnap_backups{{vm="vm00042"}} {BACKUPS_EACH}.0' in text
    assert 'vmsnap_jobs_last_day{exit_code="0",state="done",verb="backup"} 20000.0' in text
    work = Work(crowd)
    assert work.of(lambda: metrics_text(crowd)) < 40 * VMS * BACKUPS_EACH


def test_pages_follow_each_other_without_a_gap_or_a_double(crowd: House) -> None:
    seen: list[str] = []
    before: tuple[str, str] | None = None
    while page := crowd.catalogue.page(vm="", before=before, limit=9999):
        seen += [each["backup"] for each in page]
        before = (page[-1]["time"], page[-1]["backup"])
    assert len(seen) == len(set(seen)) == VMS * BACKUPS_EACH


# -- over the wire


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentHouse]:
    folder = tmp_path_factory.mktemp("wire")
    certificate, key = make_certificate(folder)
    configuration = f"""
[agent]
listen = "127.0.0.1:0"
certificate = "{certificate}"
key = "{key}"
"""
    house = AgentHouse(folder, configuration=configuration)
    house.start_agent()
    yield house
    house.close()


def test_the_command_line_drives_an_agent_over_tls_with_a_token(wire: AgentHouse) -> None:
    token = wire.json("agent", "token", "add", "cli", "--role", "operate", "--expires", "1h")["token"]
    far = {"VMSNAP_AGENT": wire.https, "SSL_CERT_FILE": str(wire.folder / "agent.crt")}
    far |= {"VMSNAP_AGENT_TOKEN": token, "VMSNAP_STATE_DIR": str(wire.folder / "another")}
    made = wire.json("backup", "vm001", "--tag", "far", **far)
    assert made["vm"] == "vm001" and made["backup"]
    listed = eventually(lambda: wire.json("list", **far), "the catalogue")
    assert [each["backup"] for each in listed] == [made["backup"]] and listed[0]["tags"] == ["far"]
    job = next(each for each in wire.json("jobs", **far) if each["verb"] == "backup")
    assert job["requester"] == "cli" and wire.json("jobs", str(job["job"]), **far)["result"] == made
    assert "no VM named 'nobody'" in wire.error(3, "backup", "nobody", **far), "the exit code comes along"
    assert "token" in wire.error(2, "jobs", **{**far, "VMSNAP_AGENT_TOKEN": "vmsnap_wrong"})
    assert "token" in wire.error(2, "jobs", **{**far, "VMSNAP_AGENT_TOKEN": ""})
    assert "cannot be trusted" in wire.error(1, "jobs", **{**far, "SSL_CERT_FILE": ""})
    assert "no agent's URL" in wire.error(2, "jobs", "--agent", "http://127.0.0.1:1")
    wire.json("agent", "token", "remove", "cli")
    assert "token" in wire.error(2, "jobs", **far)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
def test_the_socket_is_its_owners_alone_and_the_port_speaks_tls_alone(wire: AgentHouse) -> None:
    assert wire.socket.stat().st_mode & 0o777 == 0o600
    assert wire.socket.parent.stat().st_mode & 0o777 == 0o700
    host, port = "127.0.0.1", int(wire.https.rpartition(":")[2])
    plain = http.client.HTTPConnection(host, port, timeout=30)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/api/v1/health")
        plain.getresponse()
    plain.close()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, port), timeout=30) as connection, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(connection)


def test_a_job_is_followed_by_events_to_its_end(wire: AgentHouse) -> None:
    client = AgentClient(f"unix:{wire.socket}")
    job = client.post("/jobs/backup", {"vm": "vm001"})
    seen = list(client.watch(job["job"]))
    assert seen[-1]["state"] == "done" and seen[-1]["result"]["backup"].startswith("vm001-")
    assert [each["state"] for each in seen] == sorted(
        (each["state"] for each in seen), key=["queued", "starting", "running", "done"].index
    )
    assert [each["ended"] is not None for each in seen].count(True) == 1
    with pytest.raises(NotFound):
        list(client.watch(10**9))


def test_schedules_are_added_paused_run_and_removed_from_the_command_line(wire: AgentHouse) -> None:
    wire.configuration.write_text(
        wire.configuration.read_text() + '\n[schedule.fixed]\ncron = "0 4 * * *"\nvms = ["none"]\n'
    )
    added = wire.json("schedule", "add", "nightly", "--cron", "30 2 * * *", "--vm", "vm*", "--keep-daily", "7")
    assert added["keep"] == {"daily": 7} and added["next"] and not added["paused"]
    assert [each["name"] for each in wire.json("schedule", "list")] == ["fixed", "nightly"]
    assert "configuration file" in wire.error(2, "schedule", "remove", "fixed")
    assert "configuration file" in wire.error(1, "schedule", "add", "fixed", "--cron", "0 4 * * *")
    assert "there is a schedule" in wire.error(1, "schedule", "add", "nightly", "--cron", "0 4 * * *")
    assert "five fields" in wire.error(2, "schedule", "add", "bad", "--cron", "nightly")
    assert (
        wire.json("schedule", "pause", "nightly")["paused"] and not wire.json("schedule", "resume", "nightly")["paused"]
    )
    assert "nothing to do" in wire.error(2, "schedule", "run-now", "fixed")
    (job,) = wire.json("schedule", "run-now", "nightly")
    assert wire.ended(job["job"]).state == "done"
    assert "schedule:nightly" in wire.json("list", "--vm", "vm001")[-1]["tags"]
    wire.json("schedule", "remove", "nightly")
    assert wire.error(3, "schedule", "remove", "nightly")
    assert "rests" not in wire.text("schedule", "list")


def test_tables_for_people_name_what_is_there(wire: AgentHouse) -> None:
    wire.json("agent", "token", "add", "shown", "--role", "read", "--expires", "90d")
    assert "shown" in wire.text("agent", "token", "list") and "read" in wire.text("agent", "token", "list")
    assert "there is a token" in wire.error(1, "agent", "token", "add", "shown")
    assert wire.error(3, "agent", "token", "remove", "nobody")
    assert "recover" in wire.text("jobs") and "done" in wire.text("jobs", "1")
    assert wire.error(3, "jobs", "999999") and wire.json("jobs", "--state", "failed", "--vm", "other") == []
    by_socket = {"VMSNAP_AGENT": f"unix:{wire.socket}"}
    assert wire.json("jobs", "1", **by_socket)["verb"] == "recover"
    assert wire.text("list", "--vm", "nobody", **by_socket).startswith("backup")


def test_the_catalogue_follows_the_repository_whoever_changes_it(wire: AgentHouse) -> None:
    made = [wire.json("backup", "vm001")["backup"] for _ in range(2)]
    first = wire.json("agent", "refresh")
    assert first["entered"] >= 2 and first["backups"] == len(wire.json("list"))
    assert (
        wire.json("agent", "refresh")["entered"] == 0
        and wire.json("agent", "refresh", "--all")["entered"] == first["backups"]
    )
    wire.json("forget", made[0])
    assert wire.json("agent", "refresh")["struck"] == 1
    manifest = next(Path(wire.repository, "manifests").rglob(f"*{made[1].lower()}*"))
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told = wire.run("agent", "refresh", "--all")
    assert told.returncode == 4 and made[1].lower() in told.stderr
    manifest.write_bytes(whole)
    known = {each["backup"] for each in AgentClient(f"unix:{wire.socket}").get("/backups")["items"]}
    assert made[1] in known and made[0] not in known


def test_what_the_agent_refuses_the_library_raises(wire: AgentHouse) -> None:
    client = AgentClient(f"unix:{wire.socket}")
    with pytest.raises(NotFound):
        client.get("/vms/nobody")
    with pytest.raises(UsageError, match="vm"):
        client.post("/jobs/backup", {"vm": "--help"})
    with pytest.raises(VmsnapError, match="cannot be reached"):
        AgentClient("unix:/nonexistent/agent.sock").get("/vms")
    for url in ("http://host", "https://user:secret@host", "unix:relative", "ftp://x"):
        with pytest.raises(UsageError) as told:
            AgentClient(url, "t")
        assert "secret" not in str(told.value)
    assert Busy.exit_code == 5


def test_units_are_what_systemd_takes(wire: AgentHouse, tmp_path: Path) -> None:
    import subprocess

    made = wire.json("agent", "units", "--output", str(tmp_path))
    assert [each["unit"] for each in made] == ["vmsnap-agent.service", "vmsnap-agent.socket"]
    assert "exists" in wire.error(2, "agent", "units", "--output", str(tmp_path))
    service = (tmp_path / "vmsnap-agent.service").read_text()
    assert "KillMode=process" in service and "/usr/bin/vmsnap" not in service
    for words in (
        ["verify", *(each["path"] for each in made)],
        # Its score times ten: what the unit gives up is never given back unseen.
        ["security", "--offline=true", "--threshold=83", made[0]["path"]],
    ):
        done = subprocess.run(["systemd-analyze", "--no-pager", *words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done


def test_a_loop_that_hangs_is_told_to_a_load_balancer(served: Served) -> None:
    assert ask(served.client(), "GET", "/api/v1/health").status_code == 200
    served.context.loop_age = lambda: 1000.0
    answer = ask(served.client(), "GET", "/api/v1/health")
    assert answer.status_code == 503 and answer.json()["status"] == "the loop hangs"
    assert ask(served.client(), "GET", "/metrics").status_code == 401


# -- what the documentation says


def test_every_route_and_metric_is_documented_and_the_examples_use_metrics_that_there_are(served: Served) -> None:
    import re

    import yaml

    docs = Path(__file__).parent.parent / "docs"
    document = ask(served.client(trusted=True), "GET", "/api/v1/openapi.json").json()
    api = (docs / "api.md").read_text()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"| `{method.upper()}` | `{path.removeprefix('/api/v1')}` |" in api, (method, path)
    names = set(re.findall(r"^# TYPE (vmsnap_\w+) ", metrics_text(served.house).decode(), re.MULTILINE))
    assert len(names) > 12
    rules = yaml.safe_load((docs / "examples" / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((docs / "examples" / "grafana-dashboard.json").read_text())["panels"]
    expressions = [rule["expr"] for rule in rules] + [panel["targets"][0]["expr"] for panel in panels]
    assert len(expressions) > 20
    for expression in expressions:
        used = {name.removesuffix("_bucket") for name in re.findall(r"vmsnap_\w+", expression)}
        assert used and used <= names, expression
    told = (docs / "agent.md").read_text()
    prefix = "vmsnap_last_backup_"
    for name in names:
        assert name in told or f"`…_{name.removeprefix(prefix)}`" in told, name
