"""The pieces of RAM of a running QEMU, and what each is made of."""

from __future__ import annotations

from pathlib import Path

from vmsnap.model import MemoryRegion
from vmsnap_drivers.qemu.commandline import Argument
from vmsnap_drivers.qemu.image_names import absolute
from vmsnap_drivers.qemu.monitor import Monitor
from vmsnap_drivers.qemu.peer import file_system_of


def memory_regions(monitor: Monitor, arguments: list[Argument], cwd: str) -> list[MemoryRegion]:
    """Ask QEMU; `arguments` is its command line, `cwd` what names in it are relative to."""
    objects = {a.properties.get("id"): a.properties for a in arguments if a.name == "object"}
    regions: list[MemoryRegion] = []
    for entry in monitor.execute("query-memdev"):
        name = entry.get("id", "memory")
        properties = objects.get(name)
        backing = "anonymous"
        if properties is not None and properties.get("qom-type") == "memory-backend-memfd":
            backing = "memfd"
        elif properties is not None and properties.get("mem-path"):
            path = absolute(properties.get("mem-path"), cwd)
            backing = f"{file_system_of(Path(path))}:{path}"
        regions.append(MemoryRegion(name, entry["size"], 4096, backing))
    return regions
