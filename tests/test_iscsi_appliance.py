"""The patent's scenario whole: a storage appliance with thin volumes behind LIO and behind tgt, reached over SSH and
iSCSI alone, and a working VM on the host whose disk is ``iqn.2009-12.com.example:001``, or ``…:005`` and libvirt's;
and what is left where the appliance vanishes. The targets of LIO ask for CHAP.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from tests.guardians import remove_host
from tests.lab import Disk, LabMachine, disk_records, find_qemu, serial
from tests.lab.appliance import USER, Appliance, add_known_hosts
from tests.lab.lio import QEMU
from tests.lab.qmp import Oracle, seconds_between
from tests.lab.sshd import make_key
from tests.left_out import EXHAUSTIVE
from tests.proxy import Proxy
from tests.qemu_stage import MIB, chap_arguments, end_all, until
from tests.test_cli import Scripts
from tests.test_live_backup_qemu import processes_of, text_after_two_checks
from tests.watching import Before, table
from tests.world import FaultyDrivers
from vmsnap.controller import Controller, Drivers
from vmsnap.errors import Busy, SnapshotError, VmsnapError
from vmsnap.host import HostFolders
from vmsnap.model import Disk as ModelDisk
from vmsnap.model import VmState, Window
from vmsnap.places import create_repository
from vmsnap.repository import Repository
from vmsnap.roles import DriverContext, SnapshotMechanism
from vmsnap.testing.faults import FaultPlan, FaultySnapshotMechanism
from vmsnap_drivers.snapshots.iscsi import IscsiMechanism

pytestmark = [pytest.mark.qemu, pytest.mark.storage, pytest.mark.timeout(900)]

P = ParamSpec("P")
T = TypeVar("T")
AUTHORITIES = {"lio": "iqn.2009-12.com.example", "tgt": "iqn.2009-12.com.example.tgt"}
ACCOUNT, WORD = "keeper", "word-of-chap-12"
SIZE_MIB = 80
DUPLICATE = "duplicate of vm001"
PAUSE_SECONDS = 100.0
"""Commands take seconds in an emulated appliance; in a real one they do not."""


def options_of(appliance: Appliance, server: str, word: Path) -> dict[str, str]:
    """The mechanism's, for the LUNs of a server there; LIO's want the secret in the file `word`."""
    given = {
        "lio": {"chap_user": ACCOUNT, "chap_password_file": str(word)},
        "tgt": {"initiators": appliance.initiator},
    }
    return {
        "appliances": f"{appliance.portal(server)}=ssh://root@127.0.0.1:{appliance.ssh_port}",
        "known_hosts": str(appliance.known_hosts),
        "ssh_key": str(appliance.key),
        "pause_seconds": "90",
        **given[server],
    }


class Site:
    """The appliance, the VM on the host on what serves there (``lio`` or ``tgt``), and vmsnap's state there."""

    def __init__(self, place: Path, appliance: Appliance, server: str, machine: LabMachine) -> None:
        self.place = place
        self.server = server
        self.before = appliance.traces()
        self.appliance = appliance
        self.machine = machine
        self.folders = HostFolders.find(place / "state")
        self.repository: Repository = create_repository(str(place / "repository"))

    def target(self, name: str = "001") -> str:
        """The target of that name, as this server calls it."""
        return f"{AUTHORITIES[self.server]}:{name}"

    def address(self, name: str = "001") -> str:
        """Its first disk."""
        return self.appliance.address(self.target(name), self.server)

    def options(self, port: int = 0, user: str = "root") -> dict[str, str]:
        """The mechanism's, its SSH behind another port where one is given. What serves there, it finds out."""
        found = options_of(self.appliance, self.server, self.place / "word")
        ssh = f"{user}@127.0.0.1:{port or self.appliance.ssh_port}"
        return {**found, "appliances": f"{self.appliance.portal(self.server)}=ssh://{ssh}"}

    @contextlib.contextmanager
    def controller(self, plan: FaultPlan | None = None) -> Iterator[Controller]:
        options = {"iscsi": self.options()}
        context = self.folders.context()
        drivers = FaultyDrivers(context, plan, options) if plan else Drivers(context, options)
        with Controller(self.folders, drivers=drivers) as made:
            yield made

    def table(self) -> dict[str, str]:
        """The VM table now."""
        return table(Scripts(self.place))

    def row(self, state: str, resume_flag: int = 0, *, of: str = "", at: str = "") -> str:
        """A row of it: of a duplicate, or of the VM itself, whose disk is `at`."""
        return f"{of or 'working'}: {state} {resume_flag} disk0={at or self.address()}"

    def see_that_the_guest_runs(self) -> None:
        self.machine.wait_for_count(self.machine.latest_count() + 20)
        assert self.machine.faults() == []
        assert self.machine.oracle.status() == "running"

    def see_that_nothing_is_left(self) -> None:
        assert self.appliance.traces() == self.before
        with self.controller() as controller:
            assert controller.journal.unfinished() == []

    def disk(self, backup: str) -> Path:
        """The disk of a backup, as a raw image."""
        path = self.place / f"{backup}.raw"
        with self.repository.reader(self.repository.manifest(backup).disks[0].image, "disk0") as reader:
            reader.restore_to_file(path)
        return path


def duplicate_in(seen: Mapping[str, str]) -> str:
    """The name of the one duplicate of a VM table."""
    (name,) = (name for name, row in seen.items() if row.startswith(DUPLICATE))
    return name


@pytest.fixture(scope="module")
def appliance() -> Iterator[Appliance]:
    place = Path(tempfile.mkdtemp(prefix="vmsnap-"))
    try:
        with Appliance(place / "appliance") as made:
            yield made
    finally:
        shutil.rmtree(place)


SERVERS = ["lio", "tgt"]
OF_LIO = pytest.mark.parametrize("site", SERVERS if EXHAUSTIVE else SERVERS[:1], indirect=True)
"""What tgt serves is the same to these; `tests/test_iscsi_qemu.py` has it on this host."""


@pytest.fixture(scope="module", params=SERVERS)
def site(appliance: Appliance, request: pytest.FixtureRequest) -> Iterator[Site]:
    server, place = request.param, Path(tempfile.mkdtemp(prefix="vmsnap-"))
    target, lio = f"{AUTHORITIES[server]}:001", server == "lio"
    with contextlib.ExitStack() as stack:
        stack.callback(remove_host, place)
        (place / "word").write_text(WORD)
        machine = LabMachine(
            place / "vm001",
            find_qemu("7.2"),
            memory_mib=256,
            disks=(Disk("raw", SIZE_MIB * MIB, appliance.address(target, server), ACCOUNT if lio else ""),),
            settings={"slots": 64, "pause_us": 20000},
            extra_arguments=chap_arguments(place / "word") if lio else (),
        )
        if lio:
            appliance.add_lio(target, "vm001", SIZE_MIB, [f"{QEMU}:{machine.uuid}"], ACCOUNT, WORD)
        else:
            appliance.add(target, "vm002", SIZE_MIB)
        stack.enter_context(machine)
        stack.callback(end_all, place)
        made = Site(place, appliance, server, machine)
        machine.wait_for_check(1, timeout_seconds=200)
        with made.controller() as controller:
            controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
        yield made


def test_a_live_backup_is_read_from_a_snapshot_that_the_appliance_exports(site: Site) -> None:
    """The VM table has the VM, stopped in the pause, and then its duplicate too, on what the appliance exports."""
    seen: dict[str, dict[str, str]] = {}
    traces: set[str] = set()

    def read() -> None:
        seen["read"] = site.table()
        traces.update(site.appliance.traces() - site.before)

    plan = Before({"snapshot": lambda: seen.update(pause=site.table()), "read_into": read})
    with site.controller(plan) as controller:
        result = controller.backup("vm001", site.repository, max_pause_seconds=PAUSE_SECONDS)
        assert [disk.mechanism for disk in controller.table.get("vm001").disks] == ["iscsi"]
        stop, resume = [e for e in site.machine.oracle.events() if e["event"] in ("STOP", "RESUME")][-2:]
        assert seconds_between(stop, resume) == pytest.approx(result.pause_seconds, abs=0.01)
        site.see_that_the_guest_runs()
        site.see_that_nothing_is_left()
    assert seen["pause"] == {"vm001": site.row("stopped", 1)}
    (exported,) = (trace for trace in traces if trace.startswith("iqn."))
    captured = site.row("captured", of=DUPLICATE, at=site.address(exported.partition(":")[2]))
    assert seen["read"] == {duplicate_in(seen["read"]): captured, "vm001": site.row("executing")}
    assert site.table() == {"vm001": site.row("executing")}
    assert site.repository.verify(result.backup).findings == ()
    assert disk_records.newest_record(site.disk(result.backup), 0, slots=64) > 0


@OF_LIO
def test_a_consistent_backup_runs_its_duplicate_on_a_lun_of_the_appliance(site: Site) -> None:
    """The VM table has both with their own disks: the duplicate loaded, executing and ended beside the VM."""
    count, processes = site.machine.latest_count(), processes_of(site.place)
    seen: dict[str, dict[str, str]] = {}
    methods = ("switch_disks", "shut_down", "clone_reader")
    plan = Before({method: lambda method=method: seen.update({method: site.table()}) for method in methods})
    with site.controller(plan) as controller:
        result = controller.backup(
            "vm001", site.repository, mode="consistent", timeout_seconds=300, max_pause_seconds=PAUSE_SECONDS
        )
    assert result.mode == "consistent" and result.warnings == ()
    duplicate = duplicate_in(seen["shut_down"])
    own = site.address(f"run-{duplicate.removeprefix('bk-')}")
    for method, state in zip(methods, ("stopped", "executing", "ended"), strict=True):
        expected = {duplicate: site.row(state, of=DUPLICATE, at=own), "vm001": site.row("executing")}
        assert seen[method] == expected, method
    flushed = disk_records.flushed_count(site.disk(result.backup))
    assert flushed is not None and flushed >= count
    assert processes_of(site.place) == processes
    site.see_that_the_guest_runs()
    site.see_that_nothing_is_left()
    assert site.table() == {"vm001": site.row("executing")}


@OF_LIO
def test_a_restore_goes_onto_a_lun_of_the_appliance_is_cut_off_and_ends_in_order(site: Site) -> None:
    """LIO admits whom its target names: our programs, which write, and the VM, which has the name of the original."""
    target, volume, admitted = site.target("copy"), f"copy-{site.server}", [QEMU, f"{QEMU}:{site.machine.uuid}"]
    if site.server == "lio":
        site.appliance.add_lio(target, volume, SIZE_MIB, admitted, ACCOUNT, WORD)
    else:
        site.appliance.add(target, volume, SIZE_MIB)
    site.before |= {target, volume}
    with site.controller() as controller:
        before = site.machine.latest_count()
        backup = controller.backup("vm001", site.repository, max_pause_seconds=PAUSE_SECONDS).backup
        with pytest.raises(Busy, match=r"is in use by \S+ \(end the VM that uses it") as refused:
            controller.restore(site.repository, backup, "vm002", isolated=True, onto={"": site.address()})
        assert "\n" not in str(refused.value)
        onto = {"disk0": site.address("copy")}
        restored = controller.restore(site.repository, backup, "vm002", isolated=True, onto=onto, run=True)
        driver = controller.drivers.hypervisor("qemu", "vm002", restored.options)
        try:
            assert {disk.device: disk.address for disk in restored.disks} == onto
            assert site.table()["vm002"] == site.row("executing", of="working of vm001", at=onto["disk0"])
            _see_that_the_network_is_cut(site, Path(restored.options["qmp"]))
            log = Path(restored.options["qmp"]).with_name("serial.log")
            text = text_after_two_checks(log, 200)
            assert serial.faults(text) == [] and serial.counts(text)[0] >= before
            driver.shut_down(300)
            assert driver.state() in (VmState.ENDED, VmState.ABSENT)
            last = serial.flushed(log.read_text(errors="replace"))
            assert last is not None and last > serial.counts(text)[0], "its application has flushed at its end"
        finally:
            driver.destroy()
            driver.close()
            controller.remove_vm("vm002")
    site.see_that_the_guest_runs()
    site.see_that_nothing_is_left()


def _see_that_the_network_is_cut(site: Site, qmp: Path) -> None:
    """As QEMU tells it: the copy's NIC is the only port of its hub, whereas the original's has a way out."""
    monitor = Oracle(qmp)
    try:
        said = monitor.hmp("info network")
    finally:
        monitor.close()
    (port,) = _peers(said)
    assert said.startswith("hub ") and "type=nic" in port, said
    (port,) = _peers(site.machine.oracle.hmp("info network"))
    assert "type=user" in port


def _peers(told: str) -> list[str]:
    """What ``info network`` shows as connected to something else."""
    return [line for line in told.splitlines() if line.startswith(" \\ ")]


class Vanishing(FaultySnapshotMechanism):
    """The real mechanism; once it has done `after`, its SSH is cut off and stays away. No calls fail by themselves."""

    def __init__(self, driver: SnapshotMechanism, after: str, proxy: Proxy) -> None:
        super().__init__(driver, FaultPlan())
        self._after = after
        self._proxy = proxy

    def _call(self, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        done = super()._call(target, *args, **kwargs)
        if target.__name__ == self._after:
            self._proxy.refusing = True
            self._proxy.cut_all()
        return done


class VanishingDrivers(Drivers):
    """Drivers whose mechanism vanishes."""

    def __init__(self, context: DriverContext, options: Mapping[str, str], after: str, proxy: Proxy) -> None:
        super().__init__(context, {"iscsi": options})
        self._after = after
        self._proxy = proxy

    def mechanism(self, name: str) -> SnapshotMechanism:
        made = super().mechanism(name)
        return Vanishing(made, self._after, self._proxy) if name == "iscsi" else made


@OF_LIO
def test_what_is_left_in_an_appliance_that_vanished_is_removed_when_it_is_back(site: Site) -> None:
    before = len(site.repository.list())
    with Proxy(("127.0.0.1", site.appliance.ssh_port)) as proxy:
        add_known_hosts(site.appliance, proxy.port)
        drivers = VanishingDrivers(site.folders.context(), site.options(proxy.port), "snapshot", proxy)
        with Controller(site.folders, drivers=drivers) as controller:
            with pytest.raises(SnapshotError, match=r"ssh://root@127.0.0.1:\d+ cannot be reached"):
                controller.backup("vm001", site.repository, max_pause_seconds=PAUSE_SECONDS)
            assert len(site.repository.list()) == before
            site.see_that_the_guest_runs()
            kept = controller.recover().kept
            assert kept and all("\n" not in line for line in kept)
    left = site.appliance.traces() - site.before
    assert left and all("vmsnap-" in name for name in left)
    with site.controller() as controller:
        assert controller.journal.unfinished()
        assert controller.recover().kept == ()
    site.see_that_nothing_is_left()
    site.see_that_the_guest_runs()


@OF_LIO
def test_the_duplicate_takes_over_on_its_own_lun_and_the_vm_table_shows_both(site: Site) -> None:
    machine = site.machine
    with site.controller() as controller:
        held = controller.backup("vm001", site.repository, keep_duplicate=True, max_pause_seconds=PAUSE_SECONDS)
        duplicate = site.address(held.duplicate)
        kept = site.row("held", of=DUPLICATE, at=duplicate)
        assert site.table() == {held.duplicate: kept, "vm001": site.row("executing")}
        after = machine.wait_for_count(machine.latest_count() + 20)
        machine.kill()
        begun = len(machine.serial_text())
        controller.failover("vm001")
        until(lambda: bool(serial.checks(machine.serial_text()[begun:])), "it goes on and checks itself", 200)
        text = machine.serial_text()[begun:]
        assert serial.faults(text) == [] and serial.counts(text)[0] <= after + 20
        assert controller.vm("vm001").state == VmState.EXECUTING.value
        assert site.table() == {"vm001": site.row("executing", at=duplicate)}
    assert {site.target(held.duplicate), site.target()} <= site.appliance.traces()


def test_somebody_without_rights_and_a_machine_that_is_another_are_one_clear_line(site: Site, tmp_path: Path) -> None:
    context = DriverContext(tmp_path / "state", tmp_path / "memory")
    disk = ModelDisk("disk0", site.address(), SIZE_MIB * MIB)

    def problem(options: Mapping[str, str]) -> str:
        mechanism = IscsiMechanism(context, options)
        with pytest.raises(VmsnapError) as refused:
            mechanism.plan("vm001", [disk], "vmsnap-x", Window.FREE)
        mechanism.close()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "sudo" in problem(site.options(user=USER))
    nobody = tmp_path / "nobody"
    nobody.write_text("")
    assert "is not known" in problem({**site.options(), "known_hosts": str(nobody)})
    make_key(tmp_path / "key")
    public = " ".join((tmp_path / "key.pub").read_text().split()[:2])
    nobody.write_text(f"[127.0.0.1]:{site.appliance.ssh_port} {public}\n")
    assert "HAS CHANGED" in problem({**site.options(), "known_hosts": str(nobody)})
    assert "does not let root in" in problem({**site.options(), "ssh_key": str(tmp_path / "key")})


@pytest.mark.libvirt
@pytest.mark.exhaustive
def test_a_domain_of_libvirt_on_a_lun_of_lio_is_backed_up_and_comes_back(appliance: Appliance, tmp_path: Path) -> None:
    """The secret of CHAP is libvirt's to keep, and the initiator's name its XML's. The duplicate has both."""
    pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")
    from tests.libvirt_stage import staged

    target, initiator, word = f"{AUTHORITIES['lio']}:005", "iqn.2009-12.com.example.host:vm005", tmp_path / "word"
    word.write_text(WORD)
    appliance.add_lio(target, "vm005", SIZE_MIB, [initiator], ACCOUNT, WORD)
    lun = Disk("raw", SIZE_MIB * MIB, appliance.address(target, "lio"), ACCOUNT, initiator)
    options = {"iscsi": options_of(appliance, "lio", word)}
    settings = {"slots": 64, "pause_us": 20000}
    with staged(disks=[lun], mechanism_options=options, chap_word=WORD, **settings) as stage:
        controller, machine = stage.controller, stage.machine
        traces, before = appliance.traces(), machine.latest_count()
        live = controller.backup("vm001", stage.repository, max_pause_seconds=PAUSE_SECONDS)
        assert [(disk.mechanism, disk.address) for disk in controller.table.get("vm001").disks] == [
            ("iscsi", lun.address)
        ]
        stage.see_nothing_of_ours(f"{target}/1")
        assert appliance.traces() == traces
        rest = stage.at_rest()
        with stage.restored(live.backup):
            text = text_after_two_checks(stage.serial_log("vm002"))
            assert serial.faults(text) == [] and serial.counts(text)[0] >= before
        consistent = controller.backup(
            "vm001", stage.repository, mode="consistent", timeout_seconds=300, max_pause_seconds=PAUSE_SECONDS
        )
        assert consistent.mode == "consistent" and consistent.warnings == ()
        assert stage.at_rest() == rest and appliance.traces() == traces
        machine.wait_for_check(machine.latest_check() + 1)
        assert machine.faults() == []
        held = controller.backup("vm001", stage.repository, keep_duplicate=True, max_pause_seconds=PAUSE_SECONDS)
        after = machine.wait_for_count(machine.latest_count() + 20)
        machine.kill()
        begun = len(machine.serial_text())
        taken = controller.failover("vm001")
        assert "libvirt says that it does not run" in taken.fenced
        own = appliance.address(f"{AUTHORITIES['lio']}:{held.duplicate}", "lio")
        assert [disk.address for disk in taken.disks] == [own]
        until(lambda: bool(serial.checks(machine.serial_text()[begun:])), "it goes on and checks itself", 200)
        text = machine.serial_text()[begun:]
        assert serial.faults(text) == [] and serial.counts(text)[0] <= after + 20
        driver = controller.drivers.hypervisor("libvirt", "vm001", stage.options)
        driver.destroy()
        driver.close()
