"""Drivers are found by name, and every way in which that can fail is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap import registry
from vmsnap.errors import DriverUnavailable
from vmsnap.roles import Hypervisor


def _distribution(folder: Path, name: str, points: str, code: str) -> None:
    """An installed distribution, as importlib.metadata sees it, with one module."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    (folder / f"{name.replace('-', '_')}.py").write_text(code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_driver_is_found_by_its_name() -> None:
    assert issubclass(registry.hypervisor("simulated"), Hypervisor)


def test_an_unknown_driver_is_named_beside_those_that_are_installed() -> None:
    with pytest.raises(DriverUnavailable, match=r"no hypervisor driver 'vmware' is installed .*simulated"):
        registry.hypervisor("vmware")


def test_a_driver_that_two_packages_name_is_refused_with_both_named(site: Path) -> None:
    for name in ("one-driver", "two-driver"):
        module = name.replace("-", "_")
        _distribution(site, name, f"[vmsnap.hypervisors]\ndouble = {module}:Driver\n", "class Driver: ...\n")
    with pytest.raises(DriverUnavailable, match=r"two installed packages name .*one-driver, two-driver"):
        registry.hypervisor("double")


def test_a_driver_whose_module_lacks_something_says_what(site: Path) -> None:
    _distribution(site, "lacking", "[vmsnap.hypervisors]\nlacking = lacking:Driver\n", "import no_such_module\n")
    with pytest.raises(DriverUnavailable, match=r"'lacking' cannot be loaded: ModuleNotFoundError.*no_such_module"):
        registry.hypervisor("lacking")


def test_a_driver_that_is_no_driver_is_refused(site: Path) -> None:
    _distribution(site, "nodriver", "[vmsnap.hypervisors]\nnodriver = nodriver:Driver\n", "Driver = 3\n")
    with pytest.raises(DriverUnavailable, match="is no Hypervisor"):
        registry.hypervisor("nodriver")


def test_a_driver_that_lacks_primitives_says_which(site: Path) -> None:
    code = "from vmsnap.roles import Hypervisor\nclass Driver(Hypervisor):\n    name = 'half'\n"
    _distribution(site, "half", "[vmsnap.hypervisors]\nhalf = half:Driver\n", code)
    with pytest.raises(DriverUnavailable, match=r"it lacks abandon, .*switch_disks"):
        registry.hypervisor("half")


def test_a_broken_driver_is_listed_and_takes_no_other_down(site: Path) -> None:
    _distribution(site, "broken", "[vmsnap.hypervisors]\nbroken = broken:Driver\n", "raise RuntimeError('so it is')\n")
    found = {(driver.kind, driver.name): driver for driver in registry.installed()}
    assert "so it is" in found["hypervisor", "broken"].problem
    assert found["hypervisor", "simulated"].driver is not None
    assert found["storage backend", "file"].driver is not None
