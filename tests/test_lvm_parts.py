"""What of the mechanism ``lvm`` needs no LVM: reports and their meaning, room, and a host that has none.

The rest is shown on real volumes, in ``tests/in_guest``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap.model import Disk, Window
from vmsnap.roles import DriverContext
from vmsnap_drivers.runner import LocalRunner
from vmsnap_drivers.runs import Runs
from vmsnap_drivers.snapshots.lvm import LvmMechanism, doctor, fills, marks, room, thinmap
from vmsnap_drivers.snapshots.lvm.commands import Lvm, device_name
from vmsnap_drivers.snapshots.lvm.volumes import Volume, parse

# A row of lvs 2.03.16.
ROW = {
    "vg_name": "vg", "vg_uuid": "cZwcY8-KSDg-z2RP-I1om-6Hu2-LNsz-2Wdfga", "lv_name": "thick",
    "lv_uuid": "Lp7LaD-SIiK-HgMG-2jo2-OxEt-okcQ-AmWGe3", "lv_attr": "owi-a-s---", "lv_size": "33554432",
    "lv_tags": "", "origin": "", "pool_lv": "", "data_percent": "", "metadata_percent": "", "vg_free": "96468992",
    "vg_extent_size": "4194304", "thin_id": "", "lv_dm_path": "/dev/mapper/vg-thick", "lv_layout": "linear",
    "lv_suspended": "", "chunk_size": "0",
}  # fmt: skip
MIB = 1 << 20


def volumes(*changes: dict[str, str]) -> list[Volume]:
    return parse(json.dumps({"report": [{"lv": [ROW | {"lv_uuid": str(n)} | c for n, c in enumerate(changes)]}]}))


def test_a_volume_of_several_segments_is_one() -> None:
    assert len(parse(json.dumps({"report": [{"lv": [ROW, ROW]}]}))) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"report": [{"lv": [{}]}]}', json.dumps({"report": [{"lv": [7]}]})])
def test_another_report_is_refused(text: str) -> None:
    with pytest.raises(SnapshotError, match="does not report as expected"):
        parse(text)


def test_tags_say_what_is_ours_and_a_name_does_not() -> None:
    ours, others, thin = volumes(
        {"lv_name": "vmsnap-a.0", "lv_tags": "vmsnap,vmsnap.kind=snapshot,vmsnap.plan=vmsnap-a"},
        {"lv_name": "vmsnap-b.0", "lv_tags": "backup"},
        {"lv_name": "[pool_tmeta]", "pool_lv": "[pool]", "thin_id": "7", "lv_suspended": "suspended"},
    )
    assert (ours.ours, ours.kind, ours.plan) == (True, "snapshot", "vmsnap-a")
    assert (others.ours, others.kind, others.plan) == (False, "", "")
    assert (thin.name, thin.thin, thin.thin_id, thin.suspended) == ("pool_tmeta", True, 7, True)


@pytest.mark.parametrize(
    ("wanted", "expected_mib"), [("20%", 8), ("1", 4), ("5M", 8), ("100%", 32), ("300%", 40), ("1T", 40)]
)
def test_room_is_whole_extents_and_no_more_than_can_be_used(wanted: str, expected_mib: int) -> None:
    (volume,) = volumes({})
    assert room.room_of(volume, wanted) == expected_mib * MIB


@pytest.mark.parametrize("wanted", ["", "x", "-1", "5P", "20 %", "1.5G"])
def test_other_sizes_are_refused(wanted: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        room.room_of(volumes({})[0], wanted)


def test_a_record_of_changes_is_named_with_its_disk() -> None:
    mark, clone = volumes(
        {"lv_name": "vmsnap-a.0.mark", "lv_tags": "vmsnap,vmsnap.kind=mark,vmsnap.of=/dev/vg/web1"},
        {"lv_name": "vmsnap-a.0.bk.clone", "lv_tags": "vmsnap,vmsnap.kind=clone"},
    )
    assert mark.owned_name == "vg/vmsnap-a.0.mark of /dev/vg/web1" and clone.owned_name == "vg/vmsnap-a.0.bk.clone"


def test_names_of_devices_double_the_hyphens() -> None:
    assert device_name("a-b", "c--d") == "a--b-c----d"


def test_how_full_everything_is() -> None:
    # dmsetup status of Linux 6.1
    found = fills.parse_status(
        "vg-a: 0 65536 snapshot 8192/16384 32\nvg-b: 0 65536 snapshot Invalid\nvg-c: 0 65536 snapshot Overflow\n"
        "vg-c-cow: 0 16384 linear \nvg-pool-tpool: 0 131072 thin-pool 6 256/1024 512/1024 - rw discard_passdown - 256\n"
        "vg-x-tpool: 0 131072 thin-pool Fail\nNo devices found\n"
    )
    assert found == {
        "vg-a": fills.Fill(0.5),
        "vg-b": fills.Fill(1.0, lost=True),
        "vg-c": fills.Fill(1.0, lost=True),
        "vg-pool-tpool": fills.Fill(0.5, 0.25),
    }


class Nowhere(LocalRunner):
    """A host without LVM."""

    def find(self, program: str) -> str | None:
        return None


def test_a_host_without_lvm_handles_nothing_owns_nothing_and_says_what_to_install(tmp_path: Path) -> None:
    mechanism = LvmMechanism(DriverContext(tmp_path, tmp_path), {}, Nowhere())
    disk = Disk("disk0", "/dev/null", MIB)
    assert not mechanism.handles(disk) and not mechanism.list_owned()
    mechanism.forget_marks("vm001")
    (finding,) = mechanism.doctor()
    assert (finding.severity, finding.cure) == ("missing", "install lvm2")
    with pytest.raises(DriverUnavailable, match="install lvm2"):
        mechanism.plan("vm001", [disk], "vmsnap-t", Window.FREE)


@pytest.mark.parametrize(
    "options", [{"marks": "-1"}, {"marks": "x"}, {"pool_limit": "101"}, {"pause_seconds": "0"}], ids=str
)
def test_an_option_that_is_no_number_is_refused_when_the_plan_is_made(options: dict[str, str], tmp_path: Path) -> None:
    mechanism = LvmMechanism(DriverContext(tmp_path, tmp_path), options, Nowhere())
    with pytest.raises(UsageError, match="is no whole number"):
        mechanism.plan("vm001", [], "vmsnap-t", Window.FREE)


def test_a_pool_that_is_too_full_is_missing_in_the_findings() -> None:
    (pool,) = volumes({"lv_layout": "thin,pool", "data_percent": "91.50", "metadata_percent": "3.00"})
    assert doctor.examine_pool(pool, 90).severity == "missing"
    assert doctor.examine_pool(replace(pool, used_percent=89.0), 90).severity == "ok"
    assert Lvm(Nowhere()).usable() is False


# thin_dump 0.9.0
DUMP = """<superblock uuid="" time="1" transaction="2" flags="0" version="2" data_block_size="128" nr_data_blocks="0">
  <device dev_id="1" mapped_blocks="3" transaction="1" creation_time="0" snap_time="1">
    <single_mapping origin_block="1" data_block="0" time="0"/>
    <range_mapping origin_begin="4" data_begin="1" length="2" time="0"/>
  </device>
</superblock>
"""
REPORT = thinmap.Report(thinmap.mapped, '<device dev_id="1"', ("</device>",))


def runs_in(text: str, folder: Path) -> list[tuple[int, int]]:
    with Runs(folder) as runs:
        thinmap.add_runs(iter(text.splitlines(keepends=True)), REPORT, runs)
        return list(runs)


def test_the_blocks_of_a_thin_volume(tmp_path: Path) -> None:
    block = 64 << 10
    assert runs_in(DUMP, tmp_path) == [(block, 2 * block), (4 * block, 6 * block)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('<range_mapping origin_begin="4" data_begin="1" length="2" time="0"/>', '<ref name="7"/>'),
        ('  <device dev_id="1"', '  <def name="7">\n  </def>\n  <device dev_id="1"'),
        ('<range_mapping origin_begin="4" data_begin', '<range_mapping begin="4" data_begin'),
        ('origin_begin="4"', 'origin_begin="1"'),
        ("  <device", '  <single_mapping origin_block="0" data_block="9" time="0"/>\n  <device'),
        ('dev_id="1"', 'dev_id="2"'),
        ("</superblock>\n", ""),
        ('data_block_size="128" ', ""),
    ],
)
def test_what_a_tool_says_otherwise_is_an_error_and_not_taken_for_zeros(old: str, new: str, tmp_path: Path) -> None:
    assert old in DUMP
    with pytest.raises(SnapshotError, match="the pool's metadata"):
        runs_in(DUMP.replace(old, new, 1), tmp_path)


def test_a_mark_in_another_pool_is_not_compared_with() -> None:
    tags = "vmsnap,vmsnap.kind=mark,vmsnap.origin=u1"
    mark, here, elsewhere = volumes(
        {"lv_name": "m", "lv_tags": tags, "pool_lv": "pool"}, {"pool_lv": "pool"}, {"pool_lv": "pool2"}
    )
    assert marks.find([mark], "vg/m", "u1", here) == mark
    with pytest.raises(SnapshotError, match="was in the thin pool pool at vg/m, now in pool2"):
        marks.find([mark], "vg/m", "u1", elsewhere)
