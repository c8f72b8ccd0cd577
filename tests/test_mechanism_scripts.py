"""The scripts of snapshot mechanisms on a host that has nothing which they could use: they say what is missing, and
never that there are no snapshots. What they do elsewhere is shown on a real LVM, ZFS and target.
"""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from tests.consoles import Console
from vmsnap.cli.backends import vmsnap_iscsi, vmsnap_lvm, vmsnap_zfs
from vmsnap_drivers.runner import LocalRunner

SCRIPTS = [
    pytest.param(vmsnap_lvm, {}, "lvm is not installed (install lvm2)", id="lvm"),
    pytest.param(vmsnap_zfs, {}, "zfs is not installed (apt install zfsutils-linux", id="zfs"),
    pytest.param(
        vmsnap_iscsi,
        {"server": "tgt", "control_port": "32767"},
        "nothing serves targets on this host, and no appliance is configured (start tgtd",
        id="iscsi",
    ),
]


@pytest.mark.parametrize(("script", "options", "missing"), SCRIPTS)
def test_what_cannot_be_asked_is_not_said_to_be_empty(
    script: click.Command, options: dict[str, str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRunner, "find", lambda *_: None)
    console = Console(script, tmp_path / "state", options)
    assert missing in console("list", status=6)
    assert missing in console("snapshot", "/dev/null", status=6)


@pytest.mark.parametrize(("script", "options", "missing"), SCRIPTS)
def test_a_snapshot_that_nobody_took_is_not_found(
    script: click.Command, options: dict[str, str], missing: str, tmp_path: Path
) -> None:
    console = Console(script, tmp_path / "state", options)
    nobodys = "vmsnap-by-hand-0123456789"
    assert f"there is no snapshot '{nobodys}'" in console("delete", nobodys, status=3)
    assert f"there is no snapshot '{nobodys}'" in console("clone", nobodys, "--as", "trial", status=3)
    assert "is no name of a snapshot" in console("delete", "../web1", status=3)
    assert "--as" in console("clone", nobodys, status=2)
