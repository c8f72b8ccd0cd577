"""Turning a captured machine into the plan of a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmsnap.errors import HypervisorError
from vmsnap.roles import LoadRequest
from vmsnap_drivers.hypervisors.simulated.disks import DiskImage, Disks
from vmsnap_drivers.hypervisors.simulated.duplicates import read_ram_image
from vmsnap_drivers.hypervisors.simulated.guest import Guest
from vmsnap_drivers.hypervisors.simulated.lifecycle import bridge_folder
from vmsnap_drivers.hypervisors.simulated.process import MachinePlan


def plan_loading(vm: str, socket_path: Path, state_dir: Path, request: LoadRequest) -> MachinePlan:
    """The machine that `request` describes.

    :raises HypervisorError: the request does not fit together
    """
    try:
        device_state = json.loads(request.device_state.read_text())
        definition = request.definition
        devices = [disk["device"] for disk in definition["disks"]]
        sizes = {disk["device"]: int(disk["size_bytes"]) for disk in definition["disks"]}
        mac, bridge = definition["nic"]["mac"], definition["nic"]["bridge"]
        memory_bytes, ticks = int(definition["memory_bytes"]), float(definition["ticks_per_second"])
        registers = device_state["registers"]
        cycles, step, machine = int(registers["cycles"]), int(registers["step"]), bytes.fromhex(device_state["machine"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise HypervisorError(f"cannot load {vm}: definition or device state cannot be read: {e!r}") from e
    if device_state["disks"] != devices or device_state["memory_bytes"] != memory_bytes:
        raise HypervisorError(f"cannot load {vm}: definition and device state are of different machines")
    if len(request.images) != 1 or request.images[0].size_bytes != memory_bytes:
        raise HypervisorError(f"cannot load {vm}: it takes one RAM image of {memory_bytes} bytes")
    image = request.images[0].path.absolute()

    def guest(disks: Disks) -> Guest:
        for disk in disks.all:
            if disk.size_bytes != sizes[disk.image.device]:
                raise HypervisorError(f"disk {disk.image.device} at {disk.image.path} has {disk.size_bytes} bytes")
        loaded = Guest(read_ram_image(image, memory_bytes), disks, cycles, step)
        if not loaded.belongs_to(machine):
            raise HypervisorError(f"cannot load {vm}: {image} and the device state are not of one instant")
        return loaded

    return MachinePlan(
        vm=vm,
        socket_path=socket_path,
        disks=_images(vm, devices, request),
        guest=guest,
        mac=mac,
        bridge=bridge_folder(state_dir, bridge).absolute(),
        connected=not request.isolated,
        ticks_per_second=ticks,
        loaded=True,
    )


def _images(vm: str, devices: list[Any], request: LoadRequest) -> tuple[DiskImage, ...]:
    given = {disk.device: disk for disk in request.disks}
    if sorted(given) != sorted(devices) or len(given) != len(request.disks):
        raise HypervisorError(f"cannot load {vm}: it needs the disks {', '.join(devices)}, not {', '.join(given)}")
    for disk in request.disks:
        if disk.format != "raw":
            raise HypervisorError(f"cannot load {vm}: disk {disk.device} is {disk.format}, it takes raw images")
    return tuple(DiskImage(device, str(Path(given[device].address)), given[device].read_only) for device in devices)
