"""The whole command line by an agent: what each command asks for there, and that it does and reports it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from tests.agents import AgentHouse, eventually
from tests.browser import make_certificate
from vmsnap.agent.api.verbs import VERBS
from vmsnap.cli import remote
from vmsnap.cli.main import vmsnap

HERE_ALONE = {
    "demo": "a story on this host",
    "key add": "a new passphrase does not travel",
    "key change": "the same",
    "agent": "is the agent; its subcommands have routes of their own",
    "agent units": "files of this host",
}
"""Commands that no other host's agent does, each with why."""
BACKUP = "vm001-20260101T000000Z-123456"


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command, named by its words; of groups those that do something by themselves too."""
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            path = (*words, name)
            if not isinstance(command, click.Group) or command.invoke_without_command:
                yield " ".join(path), command
            if isinstance(command, click.Group):
                yield from commands(command, path)


def test_every_command_can_be_done_by_an_agent_but_those_that_are_listed() -> None:
    every = dict(commands(vmsnap))
    assert len(every) > 35
    here = {name for name, command in every.items() if all(each.name != "agent" for each in command.params)}
    assert here == set(HERE_ALONE)


ASKED = [
    "backup vm001 --mode consistent --max-pause 0.5 --tag a --tag b=c --accept-unencrypted --timeout 9"
    " --on-timeout keep-live --keep-duplicate --keep-for 2h --limit-rate 1M",
    f"restore {BACKUP} --as copy --run --isolated --target /srv/x --accept-loss -o qmp=/run/a=b.qmp",
    f"restore {BACKUP} --as copy --target /srv/x --target vda=iscsi://10.0.0.5/iqn.2009-12.com.example:copy/1",
    f"restore {BACKUP} --as copy --target iscsi://10.0.0.5:3260/iqn.2009-12.com.example:copy/1",
    f"consolidate {BACKUP} --target /srv/clean --store --tag t --timeout 7 --accept-loss -o capture=cow",
    f"verify {BACKUP} --boot --alive-within 3 --timeout 8 -o qmp=/x",
    f"export {BACKUP} --output /srv/out --format qcow2 --disk disk0 --disk disk1 --accept-loss --limit-rate 5M",
    f"export {BACKUP} --onto /dev/vg0/vm001 --disk disk0",
    f"copy --to s3://far/copies {BACKUP} --vm vm001 --dry-run --accept-unencrypted",
    "prune --keep-last 1 --keep-hourly 2 --keep-daily 3 --keep-weekly 4 --keep-monthly 5 --keep-yearly 6"
    " --keep-within 30d --keep-tag release --vm vm001 --tag t --dry-run",
    "prune --keep-last 3",
    f"forget {BACKUP} {BACKUP}x",
    "gc --dry-run --dead-after 2d --limit-rate 1M",
    "check --read-data --subset 2/7",
    "check --read-data --subset 5%",
    "repair --dry-run --forget-damaged",
    "repair",
    "init --encryption aes256-gcm",
    "key list",
    "key remove 0123456789abcdef",
    "agent refresh --all",
    "agent tags",
    "failover vm001 --fence",
    "duplicate list",
    "duplicate discard bk-0123456789",
    "doctor",
    "doctor vm001",
    "recover",
    "recover vm001",
    "strays --remove bk-1 --remove /srv/x",
    "log vm001 --since 12h --failed",
    "drivers",
    "drivers show qemu",
    "vm add vm001 --hypervisor qemu -o qmp=/run/q --mechanism disk0=qcow2 --mechanism a=b=file",
    "vm show vm001",
    "vm remove vm001",
]


def parsed(words: list[str]) -> tuple[str, Mapping[str, Any]]:
    """The command that the words name, and what it takes from them."""
    command: click.Command = vmsnap
    context: click.Context | None = None
    path = []
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = command.make_context("vmsnap", [], parent=context, resilient_parsing=True)
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command, path = found, [*path, str(name)]
    return " ".join(path), command.make_context(path[-1], list(words), parent=context).params


@pytest.mark.parametrize("line", ASKED)
def test_what_an_agent_is_asked_for_is_what_the_command_was_given(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Mapping[str, Any]]] = []

    def ask(_: object, verb: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append((verb, body))
        return {"job": 1, "state": "done", "result": {}}

    monkeypatch.setattr(remote, "run_job", ask)
    with pytest.raises(SystemExit) as ended:
        vmsnap([*line.split(), "--agent", "unix:/nonexistent"])
    assert ended.value.code == 0
    ((verb, body),) = asked
    (model,) = [model for model in VERBS if model.verb.removeprefix("agent-") == verb]
    words = list(model(**{key: value for key, value in body.items() if value is not None}).arguments())
    assert parsed(words) == parsed(line.split())
    assert ("--limit-rate" in line) == any(word.startswith("--limit-rate=") for word in words)


def test_every_verb_of_the_api_is_asked_for_by_a_command() -> None:
    named = {parsed(line.split())[0].replace(" ", "-") for line in ASKED}
    assert {model.verb for model in VERBS} == named


@pytest.mark.parametrize("command", ["restore B --as n --target x", "export B --output x", "export B --onto x"])
def test_a_path_on_another_host_is_a_whole_one(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        vmsnap([*command.split(), "--agent", "unix:/nonexistent"])
    assert ended.value.code == 2 and "begin it with /" in capfd.readouterr().err


# -- for real, over TLS, from a place that has nothing of the host


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentHouse]:
    folder = tmp_path_factory.mktemp("wire")
    certificate, key = make_certificate(folder)
    second = folder / "second"
    configuration = (
        f'[agent]\nlisten = "127.0.0.1:0"\ncertificate = "{certificate}"\nkey = "{key}"\nrepositories = ["{second}"]\n'
    )
    house = AgentHouse(folder, configuration=configuration)
    # A job that took this for its own would ask the agent to do it, for ever.
    house.start_agent(VMSNAP_AGENT=f"unix:{house.socket}", VMSNAP_PASSPHRASE="the agent's alone")
    yield house
    house.close()


@pytest.fixture(scope="module")
def far(wire: AgentHouse) -> dict[str, str]:
    """The environment of a machine that has a token, and nothing else of the host."""
    token = wire.json("agent", "token", "add", "far", "--role", "admin")["token"]
    return {
        "VMSNAP_AGENT": wire.https,
        "VMSNAP_AGENT_TOKEN": token,
        "SSL_CERT_FILE": str(wire.folder / "agent.crt"),
        "VMSNAP_STATE_DIR": str(wire.folder / "nowhere"),
        "VMSNAP_CONFIG": "",
    }


def test_a_machine_lives_through_all_verbs_by_an_agent(wire: AgentHouse, far: dict[str, str]) -> None:
    def there(*words: str) -> Any:
        return wire.json(*words, **far)

    assert [each["vm"] for each in there("vm", "list")] == ["vm001"]
    assert there("vm", "show", "vm001")["state"] == "executing"
    made = there("backup", "vm001", "--tag", "far", "--keep-duplicate", "--limit-rate", "1G")
    backup = made["backup"]
    listed = eventually(lambda: there("list"), "the catalogue")
    assert [each["backup"] for each in listed] == [backup]
    assert there("show", backup[:12])["moments"] == there("show", backup)["moments"] != []
    assert "no backup" in wire.error(3, "show", "nothing", **far)
    assert not there("verify", backup)["damaged"] and there("verify", backup, "--boot")["boot"]["life"]
    copy = there("restore", backup, "--as", "copy", "--run", "--isolated")
    assert (copy["vm"], copy["state"]) == ("copy", "executing") and wire.executes("copy")
    assert "copy" in wire.error(1, "restore", backup, "--as", "copy", **far), "nothing is overwritten"
    clean = wire.folder / "clean"
    assert there("consolidate", backup, "--target", str(clean))["clean"] and list(clean.iterdir())
    images = wire.folder / "images"
    (image,) = there("export", backup, "--output", str(images))["files"]
    assert Path(image["path"]).is_file()

    (held,) = there("duplicate", "list")
    assert held["backup"] == backup
    wire.json("stop", "--force", "vm001", script="vmsnap-sim")
    over = there("failover", "vm001")
    assert over["duplicate"] == held["duplicate"] and wire.executes("vm001")
    second = there("backup", "vm001", "--keep-duplicate")
    assert there("duplicate", "discard", second["duplicate"])["duplicate"] == second["duplicate"]

    second_place = str(wire.folder / "second")
    assert there("init", "-r", second_place)["encryption"] == "aes256-gcm", "the passphrase did not travel"
    copied = there("copy", "--to", second_place, backup)["copied"]
    assert [each["backup"] for each in copied] == [backup]
    (key,) = there("key", "list", "-r", second_place)
    assert key["opened"] and "no keys" in wire.error(2, "key", "list", **far)
    assert wire.error(2, "key", "remove", key["id"], "-r", second_place, **far), "the one that opens it stays"
    assert len(there("prune", "--keep-last", "1", "--vm", "vm001", "--dry-run")["removed"]) == 1
    assert there("forget", backup)["removed"] == [backup]
    assert there("prune", "--keep-last", "1")["removed"] == []
    assert there("gc")["backups"] == 1 and not there("check", "--read-data")["damaged"]
    assert not there("repair")["changed"]
    assert there("agent", "refresh", "--all")["backups"] == 1

    assert {each["subject"] for each in there("doctor")} and there("doctor", "vm001")
    assert there("recover") == {"resumed": [], "removed": [], "kept": []}
    assert there("strays") == {"strays": [], "removed": [], "passed_over": []}
    lines = there("log", "vm001", "--since", "1d")
    assert {line["protocol"] for line in lines} > {"backup, mode live", "failover"}
    assert "simulated" in {each["name"] for each in there("drivers")}
    assert there("drivers", "show", "simulated")[0]["usage"]
    assert there("vm", "remove", "copy")["vm"] == "copy"
    assert "copy" in wire.error(3, "vm", "show", "copy", **far)
    assert there("vm", "add", "again", "--hypervisor", "simulated", "-o", f"socket={copy['options']['socket']}")
    assert wire.executes("again")
    assert not (wire.folder / "nowhere").exists(), "nothing of it was done here"


def test_schedules_and_tokens_of_an_agent_are_changed_from_elsewhere(wire: AgentHouse, far: dict[str, str]) -> None:
    def there(*words: str) -> Any:
        return wire.json(*words, **far)

    added = there("schedule", "add", "nightly", "--cron", "30 2 * * *", "--vm", "vm001", "--keep-daily", "7")
    assert added == there("schedule", "list")[0] == wire.json("schedule", "list")[0]
    assert there("schedule", "pause", "nightly")["paused"] and not there("schedule", "resume", "nightly")["paused"]
    (job,) = there("schedule", "run-now", "nightly")
    assert wire.ended(job["job"]).state == "done" and job["requester"] == "far"
    assert there("schedule", "remove", "nightly") == {"name": "nightly"} and there("schedule", "list") == []
    assert "five fields" in wire.error(2, "schedule", "add", "bad", "--cron", "nightly", **far)
    assert wire.error(3, "schedule", "remove", "../../vms", **far)

    token = there("agent", "token", "add", "reader", "--role", "read", "--expires", "1d")["token"]
    reader = {**far, "VMSNAP_AGENT_TOKEN": token}
    assert [each["name"] for each in there("agent", "token", "list")] == ["far", "reader"]
    assert wire.json("vm", "list", **reader) and "needs the role" in wire.error(2, "gc", **reader)
    there("agent", "token", "remove", "reader")
    assert "token" in wire.error(2, "vm", "list", **reader)


def test_people_see_there_what_they_would_see_here(wire: AgentHouse, far: dict[str, str]) -> None:
    backup = wire.json("backup", "vm001", **far)["backup"]
    eventually(lambda: wire.run("show", backup, environment=far).returncode == 0, "the catalogue")
    shown = wire.text("show", backup, **far)
    assert "Evidence" not in shown and "moments:" in shown and "MiB" in shown and backup in shown
    drivers = wire.text("drivers", **far)
    assert "simulated" in drivers and "{" not in drivers
    assert "executing" in wire.text("vm", "show", "vm001", **far)
    assert "executing" in wire.text("vm", "list", **far)
    assert "nightly" not in wire.text("schedule", "list", **far)
    assert "kept" in wire.text("recover", **far)


def test_what_is_found_damaged_there_is_reported_and_has_its_exit_code(wire: AgentHouse, far: dict[str, str]) -> None:
    wire.json("backup", "vm001", **far)
    pack = max(
        (path for path in Path(wire.repository, "packs").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    whole = pack.read_bytes()
    pack.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    told = wire.run("check", "--read-data", "--json", environment=far)
    pack.write_bytes(whole)
    assert told.returncode == 4 and '"damaged": true' in told.stdout and told.stderr.count("\n") == 1, told
    assert wire.json("check", "--read-data", **far)["damaged"] is False
