"""The distributions in docs/examples, as their authors would have them: built, installed beside vmsnap's wheel in an
environment that has nothing else, and judged by the suites that the wheel brings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.lab.qemus import cache_folder
from tests.wheels import ROOT, CleanEnvironment

EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))

LEAST = {"btrfs": 40, "hmp": 75, "webdav": 28}
"""How many tests each has at least: a suite that was not collected passes too."""
SKIPPED = {"btrfs": 0, "hmp": 2, "webdav": 0}
"""Scenarios of a network, which hmp's VMs do not have."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    """vmsnap and all examples, from wheels."""
    made = CleanEnvironment.make(tmp_path_factory.mktemp("clean") / "venv")
    made.install("setuptools >= 68", "wheel")
    wheels = made.build(ROOT, *(EXAMPLES / name for name in NAMES))
    made.install(*(f"{wheel}[testing]" if Path(wheel).name.startswith("vmsnap-") else wheel for wheel in wheels))
    return made


def lighttpd() -> Mapping[str, str]:
    """Where the lab has the WebDAV server."""
    usr = cache_folder() / "lighttpd" / "usr"
    return {
        "LIGHTTPD": str(usr / "sbin" / "lighttpd"),
        "LIGHTTPD_MODULES": str(usr / "lib" / "lighttpd"),
        "LD_LIBRARY_PATH": str(usr / "lib" / "x86_64-linux-gnu"),
    }


def test_every_example_is_named_here() -> None:
    assert NAMES == ["btrfs", "hmp", "webdav"]


@pytest.mark.lab
@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_contract_of_its_role(environment: CleanEnvironment, tmp_path: Path, name: str) -> None:
    # the tests and what they need, and none of the code: what is tested is what was installed
    for path in (EXAMPLES / name).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    argv = ["python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-c", "/dev/null"]
    done = environment.run(argv, tmp_path, lighttpd() if name == "webdav" else {})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    found = re.search(r"^(\d+) passed(?:, (\d+) skipped)? in", done.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) >= LEAST[name] and int(found[2] or 0) == SKIPPED[name], done.stdout


def test_vmsnap_shows_them(environment: CleanEnvironment, tmp_path: Path) -> None:
    state = {"VMSNAP_STATE_DIR": str(tmp_path / "state")}
    told = json.loads(environment.run(["vmsnap", "drivers", "--json"], tmp_path, state).stdout)
    ours = {
        (entry["kind"], entry["name"], entry["distribution"]) for entry in told if entry["distribution"] != "vmsnap"
    }
    assert ours == {
        ("hypervisor", "hmp", "vmsnap-hmp"),
        ("snapshot mechanism", "btrfs", "vmsnap-btrfs"),
        ("storage backend", "webdav", "vmsnap-webdav"),
        ("storage backend", "webdavs", "vmsnap-webdav"),
    }
    assert all(entry["usable"] for entry in told if entry["distribution"].startswith("vmsnap-"))
    shown = environment.run(["vmsnap", "drivers", "show", "webdav"], tmp_path, state).stdout
    assert "-o atomic_move=yes|no" in shown and "[default: no]" in shown
