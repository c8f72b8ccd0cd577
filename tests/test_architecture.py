"""The house as docs/ and DESIGN have it: imports go one way, no file is about everything, no name says nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.order import SECONDS

ROOT = Path(__file__).parent.parent
TOPS = [ROOT / "vmsnap", ROOT / "drivers" / "vmsnap_drivers", ROOT / "storage_backends" / "vmsnap_storage_backends"]
SOURCES = sorted(path for top in TOPS for path in top.rglob("*.py"))

SIMULATED_CONSOLE = "vmsnap-sim starts VMs, and the demo shows one: there is no role for making a VM from nothing"
MAY_IMPORT_DRIVERS = {
    "vmsnap/cli/simulated.py": SIMULATED_CONSOLE,
    "vmsnap/cli/demo_story.py": SIMULATED_CONSOLE,
    "vmsnap/cli/demo_watch.py": SIMULATED_CONSOLE,
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "vmsnap":
            yield from (f"vmsnap.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "vmsnap")], ids=_name)
def test_the_core_knows_no_concrete_driver(path: Path) -> None:
    found = {name for name in _imports(path) if name.startswith(("vmsnap_drivers", "vmsnap_storage_backends"))}
    assert not found or (_name(path) in MAY_IMPORT_DRIVERS and all("simulated" in name for name in found))


@pytest.mark.parametrize("path", [p for p in SOURCES if not p.is_relative_to(ROOT / "vmsnap")], ids=_name)
def test_drivers_know_roles_model_and_errors_alone(path: Path) -> None:
    # The page cache and the disk are the host's, not the repository's.
    # Secrets come from the same kinds of places for all of them.
    # What is written through qemu-nbd is written so by the core and by drivers.
    allowed = ("vmsnap.roles", "vmsnap.model", "vmsnap.errors", "vmsnap.pagecache", "vmsnap.durable", "vmsnap.secret")
    allowed += ("vmsnap.nbdtarget",)
    for name in _imports(path):
        if name == "vmsnap" or name.startswith("vmsnap."):
            assert name.startswith(allowed), name


def _family(path: Path) -> str:
    parts = path.relative_to(ROOT / "drivers" / "vmsnap_drivers").with_suffix("").parts
    return ".".join(parts[:2]) if len(parts) > 1 else ""


@pytest.mark.parametrize("path", sorted((ROOT / "drivers" / "vmsnap_drivers").rglob("*.py")), ids=_name)
def test_drivers_do_not_know_each_other_but_for_the_code_that_they_share(path: Path) -> None:
    shared = ("vmsnap_drivers.qemu", "vmsnap_drivers.runner", "vmsnap_drivers.runs", "vmsnap_drivers.devicereader")
    shared += ("vmsnap_drivers.writeback",)
    for name in _imports(path):
        if name.startswith("vmsnap_drivers.") and not name.startswith(shared):
            assert ".".join(name.split(".")[1:3]) == _family(path), name


def test_the_protocol_imports_nothing_of_ours_and_does_no_io() -> None:
    for path in (ROOT / "vmsnap" / "protocol").glob("*.py"):
        for name in _imports(path):
            assert name.startswith(("vmsnap.protocol", "vmsnap.model")) or name in (
                "__future__",
                "enum",
                "dataclasses",
                "collections.abc",
            ), (path.name, name)


def test_the_layers_of_the_core_are_imported_downwards_only() -> None:
    order = ["model", "errors", "roles", "registry", "protocol", "repository", "controller", "agent", "cli"]
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "vmsnap" or len(parts) < 2 or parts[1] not in order:
            continue
        for name in _imports(path):
            words = name.split(".")
            if words[0] == "vmsnap" and len(words) > 1 and words[1] in order:
                lower, here = order.index(words[1]), order.index(parts[1])
                assert lower <= here or {parts[1], words[1]} == {"model", "errors"}, (_name(path), name)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_is_read_in_one_sitting_and_its_name_says_what_it_is_about(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
    assert not re.search(r"manager|helper|util|common|misc", path.name)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_product_code_has_no_asserts_shells_or_unfinished_places(path: Path) -> None:
    testing = path.is_relative_to(ROOT / "vmsnap" / "testing")
    for node in ast.walk(ast.parse(path.read_text())):
        assert testing or not isinstance(node, ast.Assert), node.lineno
        if isinstance(node, ast.Name):
            assert node.id != "NotImplementedError", node.lineno
        if isinstance(node, ast.keyword) and node.arg == "shell":
            raise AssertionError(f"a shell in line {node.value.lineno}")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())


def test_the_files_that_are_tested_first_are_there() -> None:
    assert [name for name in SECONDS if not (ROOT / name).is_file()] == []
