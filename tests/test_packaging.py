"""The distribution as users get it: the wheel in a clean environment, with every entry point."""

from __future__ import annotations

import configparser
import json
import zipfile
from pathlib import Path

import pytest

from tests.wheels import ROOT, CleanEnvironment, build


def _configuration() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "setup.cfg")
    return found


def _entry_points() -> list[tuple[str, str]]:
    section = _configuration()["options.entry_points"]
    return [
        (group, line.partition("=")[0].strip())
        for group in section
        if group != "console_scripts"
        for line in section[group].strip().splitlines()
    ]


def test_every_package_in_the_tree_is_listed_in_setup_cfg() -> None:
    listed = set(_configuration()["options"]["packages"].split())
    found = set()
    for root, top in (
        (ROOT, "vmsnap"),
        (ROOT / "drivers", "vmsnap_drivers"),
        (ROOT / "storage_backends", "vmsnap_storage_backends"),
    ):
        for init in (root / top).rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(root).parts))
    assert listed == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_all_three_import_packages_marked_as_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("vmsnap", "vmsnap_drivers", "vmsnap_storage_backends"):
        assert f"{package}/py.typed" in names
    assert {
        "vmsnap/agent/web/index.html",
        "vmsnap/agent/web/app.js",
        "vmsnap/agent/units/vmsnap-agent.service",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


@pytest.mark.slow
def test_in_a_clean_environment_the_wheel_loads_every_entry_point(wheel: Path, tmp_path: Path) -> None:
    environment = CleanEnvironment.make(tmp_path / "venv")
    environment.install(str(wheel))
    for script in ("vmsnap", "vmsnap-qemu", "vmsnap-sim", "vmsnap-lvm", "vmsnap-local", "vmsnap-s3"):
        assert "Usage" in environment.run([script, "--help"], tmp_path).stdout
    told = environment.run(["vmsnap", "drivers", "--json"], tmp_path, {"VMSNAP_STATE_DIR": str(tmp_path / "state")})
    usable = {driver["name"] for driver in json.loads(told.stdout) if not driver["problem"]}
    assert usable == {name for _, name in _entry_points()}
