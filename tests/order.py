"""Which worker tests which file, and in which order: the longest first, so that none is left alone with one at the end.

A file stays whole, since its tests share guests and servers; the files whose tests run in the storage guest stay
together in two halves, those of LVM and the others, so that two boots serve them all. One half after the other, by one
boot, would take longer than all the rest. How long each takes is told at the end of every run (``tests/times.py``);
`SECONDS` needs to be right only about which are long. The tests see to it that they are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

_LONG = {
    "test_libvirt_crashes": 300, "test_qemu_crashes": 330, "test_recovery_failures": 230, "test_live_backup_qemu": 180,
    "test_out_of_tree_examples": 200, "test_consistent_qemu": 180, "test_qemu_machines": 200,
    "test_kill_soak_qemu": 130, "test_qemu_driver_failures": 150, "test_iscsi_appliance": 250,
    "in_guest/test_lvm_backup": 140, "in_guest/test_lvm_watch": 120, "in_guest/test_lvm_warnings": 60,
    "test_duplicate_failures": 120, "test_transcripts": 120, "in_guest/test_lvm_contract": 200,
    "in_guest/test_lvm_failures": 100, "test_libvirt_contract": 110, "test_contract_hypervisor": 100,
    "test_lab_guest": 100, "test_qemu_duplicates": 100, "test_interruption": 90, "test_failover_qemu": 90,
    "in_guest/test_lvm_page": 80, "test_agent_loop": 80, "test_incremental_qemu": 70, "test_power_loss_qemu": 70,
    "test_strays": 70, "test_slow_repository_qemu": 60, "test_pause_limits": 60, "test_iscsi_qemu": 75,
    "test_iscsi_contract": 60, "test_agent_api": 60, "test_agent_page": 60, "test_agent_remote": 60,
    "test_libvirt_driver": 60, "test_simulated_contract": 60, "test_repository_stress": 60, "test_docs_blocks": 60,
    "in_guest/test_lio": 290, "test_libvirt_fsfreeze": 75, "test_libvirt_firmware": 60, "test_side_by_side": 60,
    "test_libvirt_iscsi": 55, "test_freeze_libvirt": 50, "in_guest/test_systemd": 50, "test_file_failures": 45,
    "test_power_loss": 45, "test_libvirt_changes": 45,
    "test_libvirt_inputs": 55, "test_libvirt_precopy": 30, "test_libvirt_zfs": 30,
    "test_libvirt_supported": 45, "test_backup_failures": 40, "test_iscsi_failures": 40,
    "test_iscsi_cuts": 130, "test_iscsi_trouble": 70, "in_guest/test_kernel_initiator": 80,
}  # fmt: skip
SECONDS = {f"tests/{name}.py": seconds for name, seconds in _LONG.items()}
"""About how long files take that are not short, on two cores that have nothing else to do."""
UNKNOWN_SECONDS = 20
"""What a file that is new may take."""
_IN_GUEST = "tests/in_guest/"
_HALVES = ("tests/in_guest/test_lvm", _IN_GUEST)
"""How the names of files begin that one worker gets, one after the other."""


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The same items; what stays together in the order of how long it takes as a whole, files in it likewise, each
    file's own order as it was.
    """
    files: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        files[together(item.nodeid)].add(_file(item.nodeid))
    whole = {name: sum(map(_seconds, those)) for name, those in files.items()}

    def place(item: pytest.Item) -> tuple[float, str, float, str]:
        name, file = together(item.nodeid), _file(item.nodeid)
        return -whole[name], name, -_seconds(file), file

    return sorted(items, key=place)


def together(nodeid: str) -> str:
    """The name of what a test stays together with: its file's, or that of a half of those of the storage guest."""
    file = _file(nodeid)
    return next((half for half in _HALVES if file.startswith(half)), file)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _seconds(file: str) -> float:
    return SECONDS.get(file, UNKNOWN_SECONDS)


class LongestFirst(LoadFileScheduling):
    """Hands files out in the order in which they were collected, and those of the storage guest at once."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        # It would begin with the files that have the most tests, which are the quick ones.
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return together(nodeid)
