"""The examples on the library's page, run one after the other; and the file object that they show."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmsnap
from tests.world import World
from vmsnap.repository import BytesReader
from vmsnap.repository.imagefile import ImageFile
from vmsnap_drivers.hypervisors.simulated.control import ask

PAGE = Path(__file__).parent.parent / "docs" / "library.md"


@pytest.fixture
def registered(world: World) -> Iterator[dict[str, str]]:
    """The options of the world's VM, which nobody has registered; what was made of it is ended afterwards."""
    with world.controller() as controller:
        options = dict(controller.table.get("vm001").options)
        controller.remove_vm("vm001")
    yield options
    with world.controller() as controller:
        row = controller.table.get("web1-copy")
        controller.drivers.hypervisor("simulated", "web1-copy", row.options).destroy()


def test_every_example_on_the_page_runs(
    world: World, registered: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(examples) == 5
    names = {"folder": world.folder, "folders": world.folders, "options": registered}
    for number, example in enumerate(examples):
        exec(compile(example, f"{PAGE.name}, example {number + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("web1-") and "no backup" in printed
    assert ask(Path(registered["socket"]), "status")["state"] == "executing"


def test_a_file_object_reads_as_the_same_bytes_in_a_file_do() -> None:
    content = os.urandom(10_000)
    file = ImageFile(BytesReader(content))
    assert file.readable() and file.seekable() and not file.writable()
    assert file.read(10) == content[:10] and file.tell() == 10
    assert file.seek(-100, os.SEEK_END) == 9_900 and file.readall() == content[-100:]
    assert file.seek(20_000) == 20_000 and file.read(5) == b""
    file.seek(5)
    assert file.seek(5, os.SEEK_CUR) == 10
    with pytest.raises(ValueError, match="nothing at offset -1"):
        file.seek(-1)
    with pytest.raises(ValueError, match="whence 7"):
        file.seek(0, 7)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


PUBLIC = {
    "Controller": ["add_vm", "backup", "consolidate", "failover", "recover", "remove_vm", "restore", "vms"],
    "HostFolders": ["find"],
    "copy_backups": [],
    "create_repository": [],
    "export_disks": [],
    "open_repository": [],
}
"""What programs are written against: to take one of these away, or rename it, is a change of the major version."""


def test_what_is_public_stays() -> None:
    assert set(PUBLIC) <= set(vmsnap.__all__)
    for name in vmsnap.__all__:
        found = getattr(vmsnap, name)
        assert name.startswith("__") or found.__doc__, f"{name} is public and says nothing of itself"
        for method in PUBLIC.get(name, ()):
            assert getattr(found, method).__doc__, f"{name}.{method} is public and says nothing of itself"
            assert inspect.signature(getattr(found, method)).return_annotation is not inspect.Signature.empty


def test_what_is_not_public_is_not_found_by_its_name() -> None:
    with pytest.raises(AttributeError):
        vmsnap.registry_of_everything  # noqa: B018
