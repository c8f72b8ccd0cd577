"""The simulated hypervisor as a product: starting, stopping, finding VMs, and the faults it shows on command."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmsnap.errors import (
    AlreadyExists,
    CannotCapture,
    HypervisorError,
    PauseExceeded,
    StorageFull,
    UnknownVm,
    UsageError,
    VmGone,
)
from vmsnap.model import VmState
from vmsnap.roles import CaptureRequest, DriverContext
from vmsnap.testing.rigs import eventually
from vmsnap_drivers.hypervisors.simulated import SimulatedHypervisor, lifecycle, record
from vmsnap_drivers.hypervisors.simulated.control import Reply, ask
from vmsnap_drivers.hypervisors.simulated.layout import read_disk

KIB, MIB = 1 << 10, 1 << 20


@dataclass
class Host:
    """A state folder in host memory, and the VMs started there."""

    root: Path

    @property
    def state_dir(self) -> Path:
        return self.root / "state"

    @property
    def context(self) -> DriverContext:
        return DriverContext(self.state_dir, self.root / "memory")

    def start(self, name: str = "vm001", memory_bytes: int = MIB, **options: object) -> Path:
        disks = options.pop("disks", [256 * KIB, 512 * KIB])
        started = lifecycle.start(
            name,
            memory_bytes,
            disks,
            self.root / "disks",
            state_dir=self.state_dir,
            **options,  # type: ignore[arg-type]
        )
        return Path(started.options["socket"])

    def driver(self, name: str = "vm001", timeout: str = "10") -> SimulatedHypervisor:
        return SimulatedHypervisor(name, self.context, {"timeout": timeout})

    def status(self, name: str = "vm001") -> Reply:
        return ask(lifecycle.socket_of(self.state_dir, name), "status")

    def counts(self, name: str = "vm001") -> None:
        before = self.status(name)["counter"]
        eventually(lambda: self.status(name)["counter"] > before, f"{name} counts on")


@pytest.fixture
def host() -> Iterator[Host]:
    found = Host(Path(tempfile.mkdtemp(prefix="vmsnap-test-", dir="/dev/shm")))
    (found.root / "memory").mkdir(mode=0o700)
    try:
        yield found
    finally:
        for listed in lifecycle.list_vms(found.state_dir):
            lifecycle.stop(listed.socket, force=True)
        shutil.rmtree(found.root)


# -- starting, finding, stopping


def test_a_vm_outlives_the_command_that_started_it(host: Host) -> None:
    script = (
        "import sys; from pathlib import Path; from vmsnap_drivers.hypervisors.simulated import lifecycle; "
        "root = Path(sys.argv[1]); lifecycle.start('vm001', 1 << 20, [1 << 18], root, state_dir=root / 'state')"
    )
    subprocess.run([sys.executable, "-c", script, str(host.root)], check=True, timeout=120)
    host.counts()
    host.start("vm002")
    pid = host.status("vm002")["pid"]
    assert os.getsid(pid) != os.getsid(0)
    assert {str(Path(f"/proc/{pid}/fd/{standard}").readlink()) for standard in (0, 1, 2)} == {"/dev/null"}


def test_vms_are_listed_with_their_state(host: Host) -> None:
    assert lifecycle.list_vms(host.state_dir) == []
    for name in ("vm001", "vm002", "vm003"):
        host.start(name)
    host.driver("vm002").pause()
    os.kill(host.status("vm003")["pid"], signal.SIGKILL)
    dead = lifecycle.socket_of(host.state_dir, "vm003")
    eventually(lambda: not record.alive(dead), "it is dead")
    states = {listed.vm: listed.state for listed in lifecycle.list_vms(host.state_dir)}
    assert states == {"vm001": "executing", "vm002": "stopped", "vm003": "dead"}
    assert list(host.driver().list_vms()) == ["vm001", "vm002"]


def test_stop_is_orderly_and_leaves_only_the_images(host: Host) -> None:
    control = host.start()
    eventually(lambda: host.status()["counter"] > 5, "it counts")
    lifecycle.stop(control)
    assert lifecycle.list_vms(host.state_dir) == []
    assert list(control.parent.iterdir()) == []
    assert not any((host.state_dir / "simulated" / "bridges" / "br0").iterdir())
    found = [read_disk(path) for path in sorted((host.root / "disks").iterdir())]
    assert all(content is not None and content.clean for content in found)
    assert found[0] is not None and found[0].log[-1] == found[0].counter > 5
    with pytest.raises(UnknownVm):
        lifecycle.stop(control)


def test_a_killed_vm_leaves_dirty_disks_and_its_name_is_free(host: Host) -> None:
    control = host.start()
    eventually(lambda: host.status()["counter"] > 5, "it counts")
    images = [Path(disk["path"]) for disk in host.status()["disks"]]
    os.kill(host.status()["pid"], signal.SIGKILL)
    eventually(lambda: not record.alive(control), "it is dead")
    before = read_disk(images[0])
    assert before is not None and not before.clean
    host.start(disks=images)
    assert host.status()["counter"] >= before.latest
    host.counts()
    assert ask(control, "check") == {"fault": ""}


def test_names_and_images_are_not_taken_twice(host: Host) -> None:
    control = host.start()
    with pytest.raises(AlreadyExists):
        host.start()
    images = [Path(disk["path"]) for disk in host.status()["disks"]]
    with pytest.raises(HypervisorError, match="in use by another VM"):
        host.start("vm002", disks=images)
    lifecycle.stop(control)
    with pytest.raises(AlreadyExists):
        host.start()
    assert lifecycle.list_vms(host.state_dir) == []


def test_an_image_that_holds_something_else_is_not_written(host: Host) -> None:
    precious = host.root / "precious.img"
    precious.write_bytes(b"precious".ljust(256 * KIB, b"\0"))
    before = precious.read_bytes()
    with pytest.raises(HypervisorError, match="did not write"):
        host.start(disks=[256 * KIB, precious])
    assert precious.read_bytes() == before
    assert not list((host.root / "disks").iterdir()) and lifecycle.list_vms(host.state_dir) == []


@pytest.mark.parametrize(
    ("memory_bytes", "disks"),
    [(1000, [MIB]), (MIB + 1, [MIB]), (MIB, []), (MIB, [1000]), (MIB, [MIB + 1]), (MIB, [MIB] * 33)],
)
def test_sizes_that_cannot_be_are_refused(host: Host, memory_bytes: int, disks: list[int]) -> None:
    with pytest.raises(UsageError):
        host.start(memory_bytes=memory_bytes, disks=disks)
    with pytest.raises(UsageError):
        host.start("../vm001")


def test_a_socket_may_lie_anywhere_however_long_its_path_is(host: Host) -> None:
    folder = host.root / ("long" * 40)
    control = host.start(socket=folder / "its.sock")
    assert len(os.fsencode(control)) > 160
    driver = SimulatedHypervisor("vm001", host.context, {"socket": str(control)})
    assert driver.state() is VmState.EXECUTING
    assert control.stat().st_mode & 0o777 == 0o600
    lifecycle.stop(control)
    assert list(folder.iterdir()) == []


def test_guests_on_one_bridge_hear_each_other_and_others_do_not(host: Host) -> None:
    host.start("vm001")
    host.start("vm002")
    host.start("vm003", bridge="br1")
    eventually(lambda: min(host.status(vm)["nic"]["received"] for vm in ("vm001", "vm002")) > 3, "frames pass")
    eventually(lambda: host.status("vm003")["nic"]["sent"] > 3, "it sends")
    assert host.status("vm003")["nic"]["received"] == 0


def test_a_guest_whose_disk_is_changed_behind_its_back_faults(host: Host) -> None:
    control = host.start()
    eventually(lambda: host.status()["counter"] > 5, "it counts")
    driver = host.driver()
    driver.pause()
    Path(host.status()["disks"][1]["path"]).write_bytes(bytes(512 * KIB))
    driver.resume()
    eventually(lambda: host.status()["state"] == "fault", "it finds that out")
    assert driver.state() is VmState.ENDED and "disk1" in driver.describe().refusals[0]
    with pytest.raises(CannotCapture):
        driver.plan_capture(CaptureRequest("bk", 5.0))
    with pytest.raises(VmGone):
        driver.resume()
    with pytest.raises(HypervisorError, match="another way"):
        lifecycle.stop(control)
    lifecycle.stop(control, force=True)


@pytest.mark.parametrize("garbage", [b"\n", b"{}\n", b"[1]\n", b'{"command": 1, "arguments": 2}\n', b"\xff\xfe\n"])
def test_garbage_on_the_control_socket_is_answered_by_an_error(host: Host, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(host.start()))
        client.settimeout(5)
        client.sendall(garbage)
        assert b"error" in client.recv(4096)
    host.counts()


def test_a_line_that_never_ends_is_hung_up_on(host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(host.start()))
        client.settimeout(5)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(b"x" * 65536)
    host.counts()


def test_commands_that_cannot_be_are_refused(host: Host) -> None:
    control = host.start()
    with pytest.raises(HypervisorError, match="unknown command"):
        ask(control, "reboot")
    with pytest.raises(HypervisorError, match="wrong arguments"):
        ask(control, "pause", sooner=True)
    with pytest.raises(HypervisorError, match="effect"):
        ask(control, "inject", call="pause", effect="explode")
    host.counts()


# -- capturing under injected faults


def inject(host: Host, call: str, effect: str, seconds: float = 0.0, vm: str = "vm001") -> None:
    ask(lifecycle.socket_of(host.state_dir, vm), "inject", call=call, effect=effect, seconds=seconds)


def prepared(host: Host, timeout: str = "1", max_pause_seconds: float = 5.0) -> SimulatedHypervisor:
    driver = host.driver(timeout=timeout)
    request = CaptureRequest("bk", max_pause_seconds)
    driver.prepare(request, driver.plan_capture(request))
    return driver


def nothing_is_left(host: Host) -> None:
    assert not list(host.context.memory_dir.iterdir()) and not host.driver().list_owned()


@pytest.mark.parametrize("effect", ["hang", "slow", "hang-after"])
def test_a_pause_that_is_not_answered_in_time_leaves_the_guest_running(host: Host, effect: str) -> None:
    host.start()
    driver = prepared(host, max_pause_seconds=0.1)
    inject(host, "pause", effect, seconds=0.25)
    with pytest.raises(PauseExceeded):
        driver.pause()
    host.counts()
    time.sleep(0.3)
    assert driver.state() is VmState.EXECUTING, "the pause struck afterwards"
    driver.abandon()
    nothing_is_left(host)


@pytest.mark.parametrize("call", ["pause", "duplicate", "copy"])
@pytest.mark.parametrize("effect", ["fail", "fail-after", "hang", "hang-after", "slow", "die", "die-after"])
def test_whatever_fails_in_a_capture_it_can_be_given_up(host: Host, call: str, effect: str) -> None:
    host.start()
    driver = prepared(host)
    inject(host, call, effect, seconds=2.0)
    steps: list[Callable[[], object]] = [
        driver.pause,
        lambda: driver.finish_duplicate(driver.duplicate(), lambda _: None),
    ]
    try:
        for step in steps:
            step()
    except HypervisorError:
        pass
    else:
        # "hang-after" and "die-after" have nothing to come after where a copy succeeds
        assert call == "copy" and effect in ("hang-after", "die-after")
        driver.discard_duplicate("bk")
    rescuer = host.driver()
    rescuer.abandon()
    if call != "copy" and effect.startswith("die"):
        with pytest.raises(VmGone):
            rescuer.resume()
    else:
        rescuer.resume()
        host.counts()
    nothing_is_left(host)


def test_a_vm_that_does_not_answer_is_not_taken_for_absent(host: Host) -> None:
    control = host.start()
    pid = host.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(HypervisorError, match="no answer"):
            host.driver(timeout="0.3").state()
        assert any(finding.severity == "missing" for finding in host.driver(timeout="0.3").doctor())
    finally:
        os.kill(pid, signal.SIGCONT)
    host.counts()
    os.kill(pid, signal.SIGSTOP)
    lifecycle.stop(control, force=True)
    assert host.driver().state() is VmState.ABSENT


def test_room_for_the_ram_is_asked_for_before_anything_is_done(host: Host) -> None:
    host.start()
    context = DriverContext(host.state_dir, host.context.memory_dir, memory_budget_bytes=MIB - 1)
    driver = SimulatedHypervisor("vm001", context, {})
    with pytest.raises(StorageFull):
        driver.plan_capture(CaptureRequest("bk", 5.0))
    spool = host.root / "spool"
    spool.mkdir()
    context = DriverContext(host.state_dir, host.context.memory_dir, spool, memory_budget_bytes=MIB - 1)
    driver = SimulatedHypervisor("vm001", context, {})
    request = CaptureRequest("bk", 5.0)
    driver.prepare(request, driver.plan_capture(request))
    driver.pause()
    duplicate = driver.duplicate()
    driver.resume()
    assert driver.finish_duplicate(duplicate, lambda _: None).folder == spool / "bk"
    driver.discard_duplicate("bk")
    assert list(spool.iterdir()) == []


def test_pages_that_were_never_touched_take_no_room(host: Host) -> None:
    host.start(memory_bytes=16 * MIB)
    driver = host.driver()
    for _ in range(3):
        request = CaptureRequest("bk", 5.0)
        driver.prepare(request, driver.plan_capture(request))
        driver.pause()
        duplicate = driver.duplicate()
        driver.resume()
        duplicate = driver.finish_duplicate(duplicate, lambda _: None)
        assert duplicate.details["copied_bytes"] <= 9 * MIB
        driver.discard_duplicate("bk")
