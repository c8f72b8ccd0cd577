"""Duplicates of a real guest: several of one image, out of reach of the original and of each other, on both QEMUs."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab import LabMachine, find_qemu
from tests.lab import serial as console
from tests.lab.bridge import Bridge
from tests.qemu_bench import VERSIONS, Bench, Captured, bench, folder, machines, serial_log
from vmsnap.errors import HypervisorError, VmsnapError
from vmsnap.model import VmState
from vmsnap.roles import LoadRequest
from vmsnap.testing.rigs import digest
from vmsnap_drivers.hypervisors.qemu import QemuHypervisor
from vmsnap_drivers.qemu import life

pytestmark = pytest.mark.qemu
__all__ = ["bench", "folder", "machines"]

_numbers = itertools.count(1)


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def own_disks(captured: Captured, name: str) -> dict[str, Path]:
    """Copies of the captured disks, for one more duplicate."""
    copies = {device: path.with_name(f"{name}-{path.name}") for device, path in captured.disks.items()}
    for device, path in captured.disks.items():
        shutil.copyfile(path, copies[device])
    return copies


def request_for(bench: Bench, captured: Captured, disks: dict[str, Path], **changes: bool) -> LoadRequest:
    description = bench.driver.describe()
    given = tuple(replace(disk, address=str(disks[disk.device]), handle={}) for disk in description.disks)
    duplicate = captured.duplicate
    return LoadRequest(
        description.definition, duplicate.images, duplicate.device_state, given, details=duplicate.details, **changes
    )


def runs(log: Path, counts: int = 20) -> str:
    """What the guest has said once it has counted on for a while and checked itself."""
    until(lambda: log.exists() and len(console.counts(log.read_text(errors="replace"))) >= counts, "it counts on")
    text = log.read_text(errors="replace")
    assert console.faults(text) == []
    return text


def test_duplicates_of_one_image_share_its_memory_and_leave_it_as_it_was(bench: Bench) -> None:
    captured = bench.capture(copy_disks=True)
    images = {image.path: digest(image.path) for image in captured.duplicate.images}
    ram = max(captured.duplicate.images, key=lambda image: image.size_bytes)
    loaders = [QemuHypervisor(name, bench.context, {}) for name in ("vm002", "vm003")]
    try:
        for loader in loaders:
            loader.load(request_for(bench, captured, own_disks(captured, loader.vm), isolated=True))
            nics = loader.cut_network()
            assert [nic.network for nic in nics] == ["a hub with no other port"]
            assert not any(nic.connected for nic in (*nics, *loader.describe().nics))
            loader.resume()
        for loader in loaders:
            runs(serial_log(bench, loader.vm))
        for loader in loaders:
            shared, own = pages_of(loader.monitor.peer_pid, ram.path)
            assert shared > 0 and own > 0, "its pages are the image's, until it writes to one"
        assert {path: digest(path) for path in images} == images
        assert len({loader.monitor.peer_pid for loader in loaders}) == 2
    finally:
        for loader in loaders:
            loader.destroy()
    bench.driver.discard_duplicate("bk001")
    assert bench.machine.faults() == []


def pages_of(pid: int, image: Path) -> tuple[int, int]:
    """Bytes of the process's mapping of an image: shared with the image, and its own copies."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    mapping = text[text.index(str(image)) :]
    found = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", mapping.split("VmFlags")[0], re.M)}
    return found["Shared_Clean"] + found["Shared_Dirty"], found["Private_Dirty"]


def test_disks_that_are_another_vms_are_refused_by_whatever_name(bench: Bench) -> None:
    captured = bench.capture(copy_disks=True)
    first, second = (QemuHypervisor(name, bench.context, {}) for name in ("vm002", "vm003"))
    request = request_for(bench, captured, captured.disks, isolated=True)
    first.load(request)
    try:
        assert {disk.address for disk in first.switch_disks(request.disks)} == {d.address for d in request.disks}
        with pytest.raises(HypervisorError, match="none of its own disks"):
            first.switch_disks(request.disks[:1])
        links = own_disks(captured, "vm003")
        links["disk0"].unlink()
        links["disk0"].hardlink_to(captured.disks["disk0"])
        with pytest.raises(HypervisorError, match=r"a disk of VM 'vm002'|lock"):
            # QEMU 7.2 takes its locks when it loads, 10.0 when the guest first runs.
            again = request_for(bench, captured, links, isolated=True)
            second.load(again)
            second.switch_disks(again.disks)
    finally:
        first.destroy()
        second.destroy()
    bench.driver.discard_duplicate("bk001")


def test_a_guest_that_dies_while_life_is_awaited_is_not_said_to_live(bench: Bench) -> None:
    captured = bench.capture(copy_disks=True)
    loader, _ = bench.loaded(captured, "vm002", isolated=True)
    try:
        with pytest.raises(HypervisorError, match="stopped instead of executing"):
            loader.await_life(0.5)
        loader.resume()
        said = loader.await_life(30)
        assert "serial" in said
        runs(serial_log(bench, "vm002"), counts=5)
        # A guest that says nothing counts as alive only as long as nothing happens to it.
        silent = bench.context.state_dir / "nothing.log"
        reset = threading.Timer(0.5, loader.monitor.execute, ["system_reset"])
        reset.start()

        with pytest.raises(HypervisorError, match=r"RESET|SHUTDOWN|ended while"):
            life.await_life("vm002", loader.monitor, [silent], None, 30)
        reset.join()
    finally:
        loader.destroy()
    bench.driver.discard_duplicate("bk001")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_guest_s_agent_answers_from_the_duplicate(version: str, folder: Path) -> None:
    """Debian's qemu-ga in the guest. The original's socket is not the duplicate's, which never talks to it."""
    arguments = (
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={folder}/agent.sock,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0,nr=1"),
    )
    machine = LabMachine(folder / "guest", find_qemu(version), settings={"agent": 1}, extra_arguments=arguments)
    with machine:
        until(lambda: life.answers(folder / "agent.sock"), "the original's agent answers")
        bench = Bench(folder, machine)
        captured = bench.capture(copy_disks=True)
        loader, _ = bench.loaded(captured, "vm002", isolated=True)
        try:
            loader.resume()
            own = serial_log(bench, "vm002").parent
            logs, agent = life.signs(loader.monitor, own)
            assert agent is not None and agent.parent == own and logs
            said = life.await_life("vm002", loader.monitor, [], agent, 120)
            assert re.fullmatch(r"its guest agent answered within \d+\.\d s", said)
            until(lambda: life.answers(folder / "agent.sock"), "the original's goes on answering")
        finally:
            loader.destroy()
            bench.driver.close()


@pytest.fixture(params=VERSIONS)
def deaf(request: pytest.FixtureRequest, folder: Path) -> Iterator[Bench]:
    """A guest whose power button does nothing."""
    with LabMachine(folder / "guest", find_qemu(request.param), settings={"deaf": 1}) as machine:
        machine.wait_for_count(20)
        made = Bench(folder, machine)
        yield made
        made.driver.close()


def test_a_guest_that_ignores_its_power_button_is_given_up_and_goes_on(deaf: Bench) -> None:
    captured = deaf.capture(copy_disks=True)
    loader, _ = deaf.loaded(captured, "vm002", isolated=True)
    try:
        with pytest.raises(HypervisorError, match="cannot shut down"):
            loader.shut_down(1)
        loader.resume()
        with pytest.raises(HypervisorError, match="within 1 s: it ignores its power button"):
            loader.shut_down(1)
        assert loader.state() is VmState.EXECUTING
        runs(serial_log(deaf, "vm002"), counts=5)
    finally:
        loader.destroy()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("version", VERSIONS)
def test_no_packet_leaves_a_duplicate_until_it_takes_the_original_s_place(version: str, folder: Path) -> None:
    with Bridge(next(_numbers)) as bridge:
        machine = LabMachine(folder / "guest", find_qemu(version), network=bridge.network, settings={"packets": 1})
        with machine:
            until(lambda: len(bridge.numbers()) > 20, "the guest's packets come over the bridge")
            bench = Bench(folder, machine)
            captured = bench.capture(copy_disks=True)
            request = request_for(bench, captured, captured.disks, isolated=True)
            taking_over = replace(
                request_for(bench, captured, own_disks(captured, "taking-over")), takeover=True, isolated=False
            )
            loader = QemuHypervisor("vm002", bench.context, {})
            loader.load(request)
            try:
                nics = loader.cut_network()
                assert re.fullmatch(r"tap:tap\d+, down and on no bridge", nics[0].network)
                assert bridge.members() == {bridge.tap}
                loader.resume()
                log = serial_log(bench, "vm002")
                runs(log)
                until(lambda: len(console.packets(log.read_text(errors="replace"))) >= 8, "the duplicate sends packets")
                tried = console.packets(log.read_text(errors="replace"))
                until(lambda: bridge.numbers()[-1] > max(tried), "the original's packets go on")
                assert set(range(tried[0], tried[-1])) <= set(bridge.numbers())
                assert bridge.repeated() == set()
            finally:
                loader.destroy()
            with pytest.raises(VmsnapError):
                bench.new_driver().load(taking_over)
            assert bridge.repeated() == set()
        successor = bench.new_driver()
        successor.fence()
        successor.load(taking_over)
        try:
            successor.resume()
            until(lambda: bool(bridge.repeated()), "the packets of the duplicate come over the bridge now")
        finally:
            successor.destroy()
        bench.driver.close()
