"""What of a VM cannot be captured truthfully; looked for while it runs, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vmsnap_drivers.qemu.block_drivers import is_part, moves_past_protection
from vmsnap_drivers.qemu.capture.migration import MIGRATION_RUNS, migration_status
from vmsnap_drivers.qemu.commandline import Argument
from vmsnap_drivers.qemu.image_names import absolute
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import file_system_of, is_memory_file_system

_WRITES_BEHIND_QEMU: Final = ("vfio-", "vhost-user-", "vhost-vdpa", "vhost-scsi", "ivshmem")
_GOOD_STATES: Final = frozenset(["running", "paused", "postmigrate"])
_OWN_JOB_PREFIX: Final = "vmsnap"
_WHY_NOT: Final = {
    "suspended": "sleeps; wake it first",
    "io-error": "stands still after an error of its disk; repair that and resume it",
    "inmigrate": "waits for an incoming migration",
    "shutdown": "has shut down",
}


def refusals(monitor: Monitor, arguments: Sequence[Argument], cwd: str) -> list[str]:
    """One line for each reason, an empty list where the VM can be captured."""
    found = _of_state(monitor)
    for argument in arguments:
        found += of_argument(argument, cwd)
    if any(argument.name == "daemonize" for argument in arguments):
        found += [
            f"QEMU was daemonized, and {path!r} is relative to a folder that is not known any more (give absolute"
            " paths)"
            for path in _relative_paths(arguments)
        ]
    found += of_nodes(monitor.execute("query-named-block-nodes", {"flat": True}))
    for entry in monitor.execute("query-tpm"):
        if entry["options"]["type"] != "emulator":
            found.append(f"the TPM {entry['id']!r} is the host's own, whose state cannot be captured")
    for job in monitor.execute("query-block-jobs"):
        if not str(job.get("device", "")).startswith(_OWN_JOB_PREFIX):
            found.append(f"the block job {job.get('device')!r} ({job.get('type')}) of somebody else is going on")
    return found


def _of_state(monitor: Monitor) -> list[str]:
    status = str(monitor.execute("query-status")["status"])
    if (migration := migration_status(monitor)) in MIGRATION_RUNS:
        return [f"a migration of the VM is going on ({migration})"]
    if status not in _GOOD_STATES:
        return [f"the VM {_WHY_NOT.get(status, f'is in state {status}')}"]
    return []


def of_argument(argument: Argument, cwd: str) -> list[str]:
    """The reasons that one option gives; `cwd` is what its relative names are relative to."""
    if argument.name == "add-fd":
        return ["QEMU was given open files with -add-fd, which a new one would lack"]
    if argument.name in ("device", "netdev", "chardev", "object"):
        properties = argument.properties
        kind = properties.names and properties.get(
            {"object": "qom-type", "device": "driver"}.get(argument.name, "type")
        )
        is_device = argument.name in ("device", "netdev")
        if kind == "vhost-user" or (is_device and str(kind).startswith(_WRITES_BEHIND_QEMU)):
            return [f"{kind} {properties.get('id')!r} writes to memory and disks behind QEMU's back"]
        if is_device and properties.get("share-rw") in ("on", "true", "yes"):
            return [f"{kind} {properties.get('id')!r} shares its disk (share-rw) with others, who may write"]
        if is_device and kind in ("scsi-block", "scsi-generic"):
            return [f"{kind} {properties.get('id')!r} passes the guest's commands through to a device of the host"]
        if kind == "memory-backend-file":
            path = absolute(properties.get("mem-path"), cwd)
            if properties.get("pmem") == "on":
                return [f"{properties.get('id')!r} is persistent memory ({path}), which outlives the guest"]
            file_system = file_system_of(Path(path))
            if not is_memory_file_system(file_system):
                return [
                    f"the guest's RAM {properties.get('id')!r} lies in a file on {file_system} ({path}), not in memory"
                ]
    return []


def of_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The reasons that nodes of QEMU's block graph give, as ``query-named-block-nodes`` has them."""
    found = []
    for node in nodes:
        name = f"the block node {node['node-name']!r}"
        if moves_past_protection(node):
            found.append(f"{name} ({node['drv']}) has data moved into the guest's memory past QEMU")
        if node["ro"]:
            continue
        if node.get("encrypted"):
            found.append(f"{name} is an encrypted image, and what is made of it on this host would not be")
        if is_part(node):
            found.append(f"{name} is a part of what it lies on (offset, size), which no snapshot mechanism knows")
    return found


def _relative_paths(arguments: Sequence[Argument]) -> list[str]:
    """The files of disks and kernel that are named without their folder."""
    found = []
    for argument in arguments:
        if argument.name in ("drive", "blockdev"):
            paths = [argument.properties.get(key) for key in ("file", "filename", "file.filename")]
        elif argument.name in ("hda", "hdb", "hdc", "hdd", "cdrom", "kernel", "initrd"):
            paths = [argument.value or ""]
        else:
            continue
        nodes = [a.properties.get("node-name") for a in arguments if a.name == "blockdev"]
        found += [path for path in paths if path and ":" not in path and not path.startswith("/") and path not in nodes]
    return found
