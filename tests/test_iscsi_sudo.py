"""A storage appliance where vmsnap is not root: sudo lets its user run what the docs list, and nothing else.

The appliance is this host: a real tgtd over files on a real XFS, and a real SSH server with a real sudo, which exist
for each other alone. The rules are those of ``docs/iscsi.md``, with this place's folder and address.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.lab.sshd import USER, SshServer
from tests.lab.tgtd import TargetServer, programs
from tests.lun_rig import TARGETS, LunRig, rig_on
from tests.test_file_mechanism import xfs
from vmsnap.errors import DriverUnavailable, SnapshotError, VmsnapError
from vmsnap.model import Window
from vmsnap.testing.cloning import clone_all, delete_all
from vmsnap.testing.rigs import read_all
from vmsnap.testing.snapshot import contents_of, live
from vmsnap_drivers import runner_ssh
from vmsnap_drivers.runner import LocalRunner, Output
from vmsnap_drivers.runner_ssh import SshRunner, SshSettings
from vmsnap_drivers.snapshots.iscsi.volumes import Volumes

__all__ = ["xfs"]
pytestmark = [pytest.mark.lab, pytest.mark.sshd]
DOCS = Path(__file__).parent.parent / "docs/iscsi.md"
# Debian's own, without the groups.
DEFAULTS = """Defaults env_reset
Defaults mail_badpass
Defaults use_pty
Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
root ALL=(ALL:ALL) ALL
"""


def documented(alias: str, images: str = "/srv/luns") -> str:
    """The rules with that alias, for the folder `images` and this host."""
    found = re.findall(r"^```text\n(Cmnd_Alias .*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (rules,) = (block for block in found if block.startswith(f"Cmnd_Alias {alias} "))
    rules = rules.replace("/srv/luns", images).replace("10[.]0[.]0[.]7", "127[.]0[.]0[.]1")
    return re.sub(r"^vmsnap ", f"{USER} ", rules, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetServer]:
    with TargetServer(tmp_path_factory.mktemp("tgtd")) as made:
        yield made


class Site:
    """The rig on the appliance, and its SSH server; what `USER` may do there is in `rules`."""

    def __init__(self, rig: LunRig, sshd: SshServer) -> None:
        self.rig, self.sshd = rig, sshd

    def runner(self, user: str = USER) -> SshRunner:
        """Commands there."""
        settings = SshSettings(str(self.sshd.known_hosts), str(self.sshd.key))
        return SshRunner(f"ssh://{user}@127.0.0.1:{self.sshd.port}", settings)


SiteMaker = Callable[..., AbstractContextManager[Site]]


@pytest.fixture
def site(xfs: Path, server: TargetServer, tmp_path: Path) -> Iterator[SiteMaker]:
    """Sites, by the rules of sudo and further programs there."""
    # An appliance's tgtd has the control port 0; this one must not be in the way of another. And sshd has a /run of its
    # own, where its socket is not.
    tgtadm = tmp_path / "tgtadm"
    tgtadm.write_text(
        f'#!/bin/sh\nexec nsenter --target {server.pid} --mount {programs()}/tgtadm "$@"'
        f" --control-port {server.control_port}\n"
    )
    tgtadm.chmod(0o755)

    @contextmanager
    def made(rules: str, *more: Path) -> Iterator[Site]:
        with SshServer(tmp_path / "sshd", sudoers=DEFAULTS + rules, programs=[tgtadm, *more]) as sshd:
            options = {
                "appliances": f"127.0.0.1:{server.port}=ssh://{USER}@127.0.0.1:{sshd.port}",
                "known_hosts": str(sshd.known_hosts),
                "ssh_key": str(sshd.key),
                "server": "tgt",
            }
            rigs = rig_on(xfs / "rig", server, options)
            rig = next(rigs)
            del rig.options["control_port"]
            try:
                yield Site(rig, sshd)
            finally:
                next(rigs, None)

    yield made


def problem_of(act: Callable[[], object], kind: type[VmsnapError] = SnapshotError) -> str:
    """The one line by which something fails."""
    with pytest.raises(kind) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_documented_rules_are_enough_for_a_snapshot_and_a_clone_and_for_nothing_else(
    xfs: Path, site: SiteMaker
) -> None:
    images = xfs / "rig/images"
    with site(documented("VMSNAP_FILES", str(images))) as made:
        rig, runner = made.rig, made.runner()
        life = live(rig)
        assert contents_of(rig.mechanism(), life) == list(life.contents)
        assert {owned.kind for owned in rig.mechanism().list_owned()} == {"snapshot"}
        clones = clone_all(rig, life, "bk001")
        with rig.mechanism().clone_reader(clones[0].plan, clones[0].disk) as reader:
            assert read_all(reader) == life.contents[0]
        assert {finding.severity for finding in rig.mechanism().doctor()} == {"ok"}
        delete_all(life.mechanism, clones)
        life.end()
        assert sorted(rig.server.targets()) == sorted(TARGETS)
        assert sorted(path.name for path in images.iterdir()) == ["disk0.img", "disk1.img"]
        origin = images / "disk0.img"
        for refused in (
            ["env", "cp", "--reflink=always", "--", str(origin), "/etc/passwd"],
            ["cp", "--reflink=always", "--", str(origin), str(images / "other.img")],
            ["cp", "--reflink=always", "--", f"{images}/../../shadow", str(images / "vmsnap-x")],
            ["rm", "--force", "--", str(origin)],
            ["rm", "--force", "--", str(images / "vmsnap-x"), str(origin)],
            ["tgtadm", "--control-port", "0", "--lld", "iscsi", "--mode", "account", "--op", "show"],
            ["python3", "-c", "pass"],
        ):
            said = problem_of(partial(runner.run, refused, 30))
            assert f"does not let {USER} run this without a password: {refused[0]} " in said
            assert "(allow it there (NOPASSWD): the lines for sudoers are in the docs: iscsi)" in said
        assert origin.exists()
        runner.close()


class Recording(LocalRunner):
    """Writes commands down and runs none; each answers as LVM does of a thin volume and its pool."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[list[str]] = []

    def run(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> Output:
        self.given.append(list(argv))
        row = {"lv_path": "/dev/vg0/iscsi.vmsnap-x.0", "lv_size": "1", "pool_lv": "pool", "vg_name": "vg0"}
        row |= {"lv_tags": "vmsnap-iscsi,vmsnap.plan=vmsnap-x", "data_percent": "1", "metadata_percent": "1"}
        return Output(0, json.dumps({"report": [{"lv": [row]}]}), "")


def test_the_documented_rules_for_thin_volumes_let_pass_what_is_run_and_nothing_like_it(
    site: SiteMaker, tmp_path: Path
) -> None:
    recorded = Recording()
    volumes, origin, path = Volumes(recorded), "/dev/vg0/vm001", "/dev/vg0/iscsi.vmsnap-x.0"
    volumes.look(origin)
    volumes.exists(path)
    volumes.snapshot(origin, path, "vmsnap-x", 1)
    volumes.settle(path)
    volumes.fill(origin)
    volumes.clone(path, "/dev/vg0/iscsi.vmsnap-x.0.bk-001.clone", "vmsnap-x")
    volumes.remove(path, "vmsnap-x")
    lvm = tmp_path / "lvm"
    lvm.write_text("#!/bin/sh\necho it runs\n")
    lvm.chmod(0o755)
    rules = f"{documented('VMSNAP_THIN')}{USER} ALL = (root) NOPASSWD: VMSNAP_THIN\n"
    with site(rules, lvm) as made:
        runner = made.runner()
        commands = {tuple(argv) for argv in recorded.given if argv[0] == "lvm"}
        assert {argv[1] for argv in commands} == {"lvs", "lvcreate", "lvchange", "lvremove"}
        for argv in commands:
            assert runner.run(argv, 30).stdout == "it runs\n"
            for wrong in ([*argv, "/dev/vg0/vm001"], [*argv[:3], "log{file=/etc/shadow}", *argv[4:]]):
                if argv[1] != "lvs" or wrong[3] != argv[3]:
                    assert "without a password" in problem_of(partial(runner.run, wrong, 30))
        runner.close()


@pytest.mark.parametrize(
    "rules",
    [
        f"{USER} ALL=(root) ALL",  # with a password
        f"{USER} ALL=(root) NOPASSWD: /usr/bin/id",
        f"{USER} ALL=(root) NOPASSWD: ALL, !/usr/sbin/tgtadm",
        "",
    ],
)
def test_what_sudo_refuses_is_one_line_with_its_cure(site: SiteMaker, rules: str) -> None:
    with site(f"{rules}\n") as made:
        mechanism = made.rig.mechanism()
        said = problem_of(lambda: mechanism.plan("vm001", made.rig.disks(), "vmsnap-x", Window.FREE))
        shown = "tgtadm --control-port 0 --lld iscsi --mode target --op show"
        assert f"does not let {USER} run this without a password: {shown} (allow it there (NOPASSWD)" in said
        (finding,) = (each for each in mechanism.doctor() if each.severity == "missing")
        assert f"does not let {USER} run this without a password: tgtadm " in finding.message and finding.cure


def test_a_program_that_is_not_there_is_told_from_one_that_is_refused(
    site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rules in (f"{USER} ALL=(root) NOPASSWD: ALL", f"{USER} ALL=(root) NOPASSWD: /usr/bin/id"):
        with site(f"{rules}\n") as made:
            runner = made.runner()
            said = problem_of(partial(runner.run, ["no-such-program"], 30), DriverUnavailable)
            assert "the program no-such-program is not installed on ssh://" in said
            assert runner.run(["id", "-u"], 30).stdout == "0\n"
            assert runner.find("cp") and runner.find("no-such-program") is None
            monkeypatch.setattr(runner_ssh, "_PATH", "/nowhere")
            said = problem_of(partial(runner.run, ["id"], 30), DriverUnavailable)
            assert "the program sudo is not installed on ssh://" in said
            monkeypatch.undo()
            runner.close()


def test_commands_speak_english_and_their_failures_are_their_own(site: SiteMaker) -> None:
    with site(f"{USER} ALL=(root) NOPASSWD: ALL\n") as made:
        runner = made.runner()
        assert "LC_ALL=C" in runner.run(["env"], 30).stdout.splitlines()
        done = runner.run(
            ["sh", "-c", "echo 'sudo: unable to resolve host san: Name or service not known' >&2; false"], 30
        )
        assert done.status == 1
        with pytest.raises(SnapshotError, match="No such file"), runner.stream(["cat", "/nowhere"], 30) as pipe:
            pipe.read()
        runner.close()
    with site("") as made:
        runner = made.runner()
        refused = pytest.raises(SnapshotError, match="without a password: cat /nowhere")
        with refused, runner.stream(["cat", "/nowhere"], 30) as pipe:
            pipe.read()
        runner.close()
