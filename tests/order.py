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
    "in_guest/test_lio": 570, "in_guest/test_lvm_contract": 530, "test_qemu_crashes": 350,
    "test_qemu_driver_failures": 330, "test_out_of_tree_examples": 310, "test_iscsi_cuts": 310,
    "test_iscsi_appliance": 280, "test_libvirt_crashes": 270, "test_libvirt_inputs": 260, "test_s3_faults": 210,
    "test_strays": 200, "test_libvirt_fsfreeze": 190, "test_consistent_qemu": 190, "test_qemu_machines": 180,
    "test_libvirt_driver": 180, "test_live_backup_qemu": 180, "test_simulated_contract": 160,
    "test_recovery_failures": 160, "test_transcripts": 160, "test_libvirt_contract": 150, "test_freeze_qemu": 140,
    "test_duplicate_failures": 130, "test_zfs_failures": 130, "test_agent_loop": 130, "test_qemu_duplicates": 130,
    "test_docs_blocks": 130, "test_lab_guest": 120, "test_kill_soak_qemu": 120, "test_libvirt_changes": 120,
    "in_guest/test_kernel_initiator": 120, "test_libvirt_firmware": 120, "test_agent_api": 120,
    "test_interruption": 110, "test_agent_page": 110, "test_zfs_parts": 110, "in_guest/test_lvm_backup": 100,
    "test_storage_s3": 100, "test_libvirt_iscsi": 100, "test_second_monitor": 100, "test_libvirt_supported": 100,
    "test_backup_failures": 90, "test_agent_remote": 90, "test_freeze_libvirt": 90, "test_qemu_stream_live": 90,
    "test_s3_repository": 90, "test_iscsi_trouble": 90, "test_power_loss_qemu": 90, "test_pause_limits": 80,
    "test_cli_verbs": 80, "in_guest/test_lvm_watch": 80, "test_failover_qemu": 80, "test_repository_flips": 80,
    "test_incremental_qemu": 80, "test_qemu_driver": 80, "in_guest/test_lvm_thin_maps": 70, "test_iscsi_qemu": 70,
    "test_slow_repository_qemu": 70, "in_guest/test_lvm_failures": 70, "test_cli": 70, "test_file_failures": 60,
    "test_zfs_backup": 60, "test_cli_copy": 60, "test_libvirt_zfs": 60, "test_libvirt_precopy": 50,
    "test_qcow2_mechanism_contract": 50, "test_packaging": 50, "test_s3_doctor": 50, "test_iscsi_contract": 50,
    "test_cli_key": 50, "test_sftp_faults": 50, "test_cli_integrity": 50, "test_duplicate_machine": 40,
    "test_protocol_machine": 40, "test_qcow2_changes": 40,
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
