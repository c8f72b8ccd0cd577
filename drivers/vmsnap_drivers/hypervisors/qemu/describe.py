"""What a running QEMU says of its VM. Facts from ``qapi/*.json`` of QEMU, 7.2 and 10.0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from vmsnap.errors import UsageError
from vmsnap.model import Nic, VmDescription
from vmsnap_drivers.hypervisors.qemu import tpm
from vmsnap_drivers.hypervisors.qemu.blocks import BlockReader
from vmsnap_drivers.hypervisors.qemu.definition import FORMAT, Definition, without_secrets
from vmsnap_drivers.hypervisors.qemu.devices import DeviceReader
from vmsnap_drivers.qemu import commandline
from vmsnap_drivers.qemu.commandline import Argument
from vmsnap_drivers.qemu.configuration_file import parse_configuration
from vmsnap_drivers.qemu.image_names import absolute
from vmsnap_drivers.qemu.memory_regions import memory_regions
from vmsnap_drivers.qemu.monitor import Monitor, MonitorError
from vmsnap_drivers.qemu.networks import is_connected, networks
from vmsnap_drivers.qemu.options import Options
from vmsnap_drivers.qemu.peer import Peer, look_at, started_at
from vmsnap_drivers.qemu.refusals import refusals
from vmsnap_drivers.qemu.status import vm_state

_CLOCK_SECONDS: Final = 2.0
"""How exactly it is known when a process started: the start of the host is told in whole seconds."""


def describe(vm: str, monitor: Monitor) -> VmDescription:
    """Ask for all that is to be known of the VM; changes nothing.

    :raises VmGone: QEMU ended
    """
    peer = look_at(monitor.peer_pid)
    problems: list[str] = []
    try:
        arguments = _with_configurations(commandline.parse(peer.argv), peer)
    except UsageError as e:
        arguments = []
        problems.append(str(e))
    cleaned, secrets = without_secrets(arguments)
    machine = monitor.execute("qom-get", {"path": "/machine", "property": "type"}).removesuffix("-machine")
    options = Options(cleaned)
    devices = DeviceReader(monitor, options)
    devices.read()
    blocks = BlockReader(monitor, options, devices.places, machine, peer.cwd).read()
    arguments, places = options.settled()
    definition = Definition(
        format=FORMAT,
        exe=peer.exe,
        cwd=peer.cwd,
        environment=peer.environment,
        version=monitor.version,
        machine=machine,
        default_ram=_default_ram(monitor, arguments),
        arguments=tuple((argument.name, argument.value) for argument in arguments),
        disks=tuple(
            replace(disk, argument=places[disk.argument]) for disk in blocks.defined if disk.argument is not None
        ),
        tpm=tpm.version_of(arguments),
    )
    problems += secrets + devices.problems + blocks.problems + refusals(monitor, arguments, peer.cwd)
    sizes = monitor.execute("query-memory-size-summary")
    return VmDescription(
        vm=vm,
        hypervisor="qemu",
        state=vm_state(monitor),
        memory_bytes=sizes["base-memory"] + sizes.get("plugged-memory", 0),
        vcpus=len(monitor.execute("query-cpus-fast")),
        memory=tuple(memory_regions(monitor, arguments, peer.cwd)),
        disks=tuple(blocks.disks),
        nics=tuple(
            Nic(network.nic, network.mac, network.kind or "none", is_connected(network))
            for network in networks(monitor)
            if network.nic
        ),
        definition=definition.to_json(),
        refusals=tuple(problems),
        hypervisor_version=".".join(map(str, monitor.version)),
    )


def _with_configurations(arguments: list[Argument], peer: Peer) -> list[Argument]:
    """The options, those of the configuration files that QEMU was given among them, in their places.

    :raises UsageError: a file is not as QEMU has read it
    """
    found: list[Argument] = []
    for argument in arguments:
        if argument.name != "readconfig":
            found.append(argument)
            continue
        path = Path(absolute(argument.value or "", peer.cwd))
        try:
            changed, text = path.stat().st_mtime, path.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"the file {path}, of which QEMU has read its options, cannot be read: {e}") from e
        if changed > started_at(peer.pid) + _CLOCK_SECONDS:
            raise UsageError(f"the file {path} was changed after QEMU has read its options of it")
        found += parse_configuration(text)
    return found


def _default_ram(monitor: Monitor, arguments: list[Argument]) -> str:
    try:
        backend = monitor.execute("qom-get", {"path": "/machine", "property": "memory-backend"})
    except MonitorError:
        return ""
    name = str(backend or "").rpartition("/")[2]
    named = {a.properties.get("id") for a in arguments if a.name == "object"}
    return "" if name in named else name
