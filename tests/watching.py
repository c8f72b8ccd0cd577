"""Looking in at moments of an operation: before a driver's method is called, and what the VM table shows then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from tests.test_cli import Scripts
from vmsnap.errors import VmsnapError
from vmsnap.testing.faults import FaultPlan

P = ParamSpec("P")
T = TypeVar("T")


class Before(FaultPlan):
    """Plans no faults; before the first call of each of these methods of a driver it does something."""

    def __init__(self, acts: Mapping[str, Callable[[], object]]) -> None:
        super().__init__()
        self.left = dict(acts)
        """What was not called yet."""

    def call(
        self, default: type[VmsnapError], method: str, target: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Carry a call out."""
        if act := self.left.pop(method, None):
            act()
        return super().call(default, method, target, *args, **kwargs)


def table(scripts: Scripts) -> dict[str, str]:
    """What another process is shown of the VM table: one line a VM, with the state, the resume flag, and the disks'
    devices and addresses.
    """
    return {row["vm"]: _line(row) for row in scripts.json("vm", "list")}


def _line(row: Mapping[str, Any]) -> str:
    disks = " ".join(f"{disk['device']}={disk['address']}" for disk in row["disks"])
    of = f" of {row['duplicate_of']}" if row["duplicate_of"] else ""
    return f"{row['kind']}{of}: {row['state']} {int(row['resume_flag'])} {disks}"
