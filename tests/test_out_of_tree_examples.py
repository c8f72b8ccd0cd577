"""The paths of newcomers, in an environment that has nothing but vmsnap's wheel: through the tutorial, through the
guide to a driver of one's own, and with the distributions in docs/examples, judged by the suites that the wheel brings.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import test_vmsnap_hmp
import test_vmsnap_webdav
from docs import transcripts
from tests.lab.qemus import cache_folder
from tests.test_writing_a_storage_backend import GUIDE, files_in
from tests.wheels import ROOT, CleanEnvironment
from vmsnap.testing.rigs import eventually

EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))

LEAST = {"btrfs": 40, "hmp": 90, "webdav": 28}
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


def test_a_newcomer_comes_from_pip_install_through_the_guide_to_a_passing_suite(
    environment: CleanEnvironment, tmp_path: Path
) -> None:
    source = tmp_path / "vmsnap-sqlite"
    for name, content in files_in(GUIDE.read_text()).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    environment.install("--no-build-isolation", str(source))
    # away from the sources, so that what was installed is tested
    (tmp_path / "tests").mkdir()
    (source / "test_vmsnap_sqlite.py").rename(tmp_path / "tests" / "test_vmsnap_sqlite.py")
    done = environment.run(
        ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"], tmp_path / "tests"
    )
    assert re.search(r"^22 passed in", done.stdout, re.MULTILINE), done.stdout[-3000:] + done.stderr


def test_the_tutorial_prints_what_it_says(environment: CleanEnvironment) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder:
        variables = {"PATH": f"{environment.folder / 'bin'}:{os.environ['PATH']}", "HOME": folder, "PYTHONPATH": ""}
        found = transcripts.run(page, Path(folder), variables)
    assert transcripts.plain(found) == transcripts.plain(page)


@pytest.mark.lab
@pytest.mark.qemu
def test_the_three_of_them_back_up_one_vm_and_bring_it_back(environment: CleanEnvironment, tmp_path: Path) -> None:
    """A QEMU that is reached by hmp, its disks in a subvolume of btrfs, its backups on a WebDAV server."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmsnap-", dir="/dev/shm")))
        mount = stack.enter_context(mounted_btrfs(tmp_path))
        for name, value in lighttpd().items():
            stack.enter_context(pytest.MonkeyPatch.context()).setenv(name, value)
        server = test_vmsnap_webdav.Server(tmp_path)
        stack.callback(server.stop)
        kernel = tmp_path / "guest"
        sources = EXAMPLES / "hmp"
        link = f"-Wl,-T,{sources / 'guest.ld'}"
        subprocess.run([*test_vmsnap_hmp.GCC, link, "-o", str(kernel), str(sources / "guest.c")], check=True)
        subprocess.run(["btrfs", "subvolume", "create", str(mount / "vms")], check=True, capture_output=True)
        guests = test_vmsnap_hmp.Guests(folder, kernel, images=mount / "vms")
        stack.callback(guests.end, "vm001")
        guests.running("vm001")
        variables = {"VMSNAP_STATE_DIR": str(folder / "state"), "VMSNAP_PASSPHRASE": "only a test"}
        variables["VMSNAP_REPOSITORY"] = f"webdav://127.0.0.1:{server.port}/backups"

        def vmsnap(*words: str) -> dict[str, Any]:
            done = environment.run(["vmsnap", *words, "--json"], tmp_path, variables)
            assert done.returncode == 0, done.stderr
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer

        vmsnap("init")
        monitor = f"monitor={guests.monitor('vm001')}"
        chosen = ["--mechanism", "disk0=btrfs", "--mechanism", "disk1=btrfs"]
        vmsnap("vm", "add", "vm001", "--hypervisor", "hmp", "-o", monitor, *chosen)
        backup = vmsnap("backup", "vm001")
        first = test_vmsnap_hmp.words_in(guests.ram("vm001"))
        assert backup["pause_seconds"] > 0
        assert not vmsnap("check", "--read-data")["findings"]
        restored = vmsnap("restore", backup["backup"], "--as", "vm002", "--run", "--target", str(folder / "vm002"))
        assert restored["state"] == "executing"
        pid, ram = test_vmsnap_hmp.processes(folder)["vm002"]
        stack.callback(os.kill, pid, signal.SIGKILL)
        words = test_vmsnap_hmp.words_in(ram)
        eventually(lambda: test_vmsnap_hmp.words_in(ram)[1] > words[1] + 10, "the copy counts on", 60)
        assert test_vmsnap_hmp.words_in(ram)[2] == 0, "its RAM and its disks are of different instants"
        now = test_vmsnap_hmp.words_in(guests.ram("vm001"))
        assert now[1] > first[1] and not now[2], "the first one does not go on"
        assert [path.name for path in mount.rglob("vmsnap-*")] == []


@contextlib.contextmanager
def mounted_btrfs(folder: Path) -> Iterator[Path]:
    """An empty btrfs on a loop device."""
    image, mount = folder / "btrfs.img", folder / "btrfs"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
