"""Drivers are found by name, and every way in which that can fail is one clear line."""

from __future__ import annotations

import re
import sys
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


SIGNED = """
from vmsnap.roles import Option, StorageBackend, whole_number
from vmsnap_storage_backends.local import LocalStorage
class Driver(LocalStorage):
    name = 'signed'
    {}
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def get(self, key): return b''", r"its get does not take what the role gives: too many positional"),
        (
            "def put(self, key, data, if_absent): pass",
            r"its put does not take .*missing a required argument: 'if_absent'",
        ),
        ("def list(self, begin=''): return iter(())", r"its list does not take .*unexpected keyword argument 'prefix'"),
        ("stat = 3", r"its stat is no method"),
        ("def __init__(self, url): pass", r"its __init__ does not take .*too many positional"),
        ("options = ('timeout',)", r"its options are no sequence of Option"),
        ("options = (Option('a', 'x'), Option('a', 'y'))", r"declares an option twice"),
        (
            "options = (Option('a', 'x', 'many', type=whole_number()),)",
            r"option 'a' is declared with a value that is no",
        ),
        ("needs = ('boto3',)", r"its needs are no sequence of Program or Module"),
        ("name = 'other'", r"its entry point is named 'signed' and its class 'other'"),
        ("raise SystemExit(3)", r"cannot be loaded: SystemExit: 3"),
    ],
)
def test_a_driver_that_breaks_its_signature_says_where_and_takes_no_other_down(
    site: Path, body: str, said: str
) -> None:
    _distribution(site, "signed", "[vmsnap.storage_backends]\nsigned = signed:Driver\n", SIGNED.format(body))
    sys.modules.pop("signed", None)
    with pytest.raises(DriverUnavailable, match=said):
        registry.storage_backend("signed")
    found = {(driver.kind, driver.name): driver for driver in registry.installed()}
    assert found["storage backend", "signed"].driver is None and re.search(
        said, found["storage backend", "signed"].problem
    )
    assert found["storage backend", "file"].driver is not None


def test_a_driver_may_take_more_than_its_role_gives(site: Path) -> None:
    body = "def __init__(self, url, options=None, more=3): super().__init__(url, options or {})"
    body += "\n    def get(self, *given, **named): return b''"
    _distribution(site, "signed", "[vmsnap.storage_backends]\nsigned = signed:Driver\n", SIGNED.format(body))
    sys.modules.pop("signed", None)
    assert registry.storage_backend("signed").name == "signed"


@pytest.mark.parametrize(("flag", "method"), [("clones", "clone_reader"), ("changes", "changed_extents")])
def test_a_mechanism_that_promises_what_it_has_not_is_refused(site: Path, flag: str, method: str) -> None:
    code = f"""
from vmsnap.roles import SnapshotMechanism
class Driver(SnapshotMechanism):
    name = 'promising'
    {flag} = True
    handles = plan = prepare = snapshot = reader = delete = list_owned = doctor = lambda *_: None
"""
    _distribution(site, "promising", "[vmsnap.snapshot_mechanisms]\npromising = promising:Driver\n", code)
    sys.modules.pop("promising", None)
    with pytest.raises(DriverUnavailable, match=rf"says that it has '{flag}', and lacks .*{method}"):
        registry.snapshot_mechanism("promising")


def test_what_a_driver_needs_and_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "libvirt", None)
    found = {(driver.kind, driver.name): driver for driver in registry.installed()}
    (lack,) = found["storage backend", "s3"].missing
    assert (lack.what, lack.cure) == ("the Python module boto3 is not installed", "pip install 'vmsnap[s3]'")
    assert found["hypervisor", "libvirt"].missing[0].what == "the Python module libvirt is not installed"
    assert not found["hypervisor", "simulated"].missing and not found["hypervisor", "simulated"].problem


def test_a_broken_driver_is_listed_and_takes_no_other_down(site: Path) -> None:
    _distribution(site, "broken", "[vmsnap.hypervisors]\nbroken = broken:Driver\n", "raise RuntimeError('so it is')\n")
    found = {(driver.kind, driver.name): driver for driver in registry.installed()}
    assert "so it is" in found["hypervisor", "broken"].problem
    assert found["hypervisor", "simulated"].driver is not None
    assert found["storage backend", "file"].driver is not None
