"""Tags of a domain, by a real libvirt: what virsh writes, a schedule of the agent finds."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.agents import AgentHouse
from tests.lab import find_qemu
from tests.lab.libvirtd import Libvirtd
from vmsnap_drivers.hypervisors.libvirt.tags import tags_of

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(300)]

XML = """<domain type='qemu'><name>{}</name><memory unit='MiB'>32</memory><os><type>hvm</type></os><devices>
<emulator>{}</emulator><memballoon model='none'/></devices></domain>"""


@pytest.fixture
def libvirtd() -> Iterator[Libvirtd]:
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder:
        Path(folder).chmod(0o755)
        with Libvirtd(Path(folder) / "lv") as made:
            for name in ("web1", "web2"):
                path = Path(folder) / f"{name}.xml"
                path.write_text(XML.format(name, find_qemu("7.2").binary))
                made.virsh("define", str(path))
                made.virsh("start", name)
            yield made


def test_what_virsh_writes_is_what_a_schedule_means(libvirtd: Libvirtd, tmp_path: Path) -> None:
    house = AgentHouse(tmp_path, vms=0)
    try:
        for name in ("web1", "web2"):
            house.json("vm", "add", name, "--hypervisor", "libvirt", "-o", f"uri={libvirtd.uri}")
        assert house.json("agent", "tags") == []
        libvirtd.virsh("desc", "web1", "--live", "--config", "#nightly #gold the shop, bill 4#2")
        libvirtd.virsh("desc", "web2", "--live", "--config", "--title", "#nightly")
        libvirtd.virsh(
            *("metadata", "web2", "urn:vmsnap:tags", "--key", "vmsnap", "--set", "<tags>silver, #x</tags>", "--live")
        )
        found = {each["vm"]: each["tags"] for each in house.json("agent", "tags")}
        assert found == {"web1": ["gold", "nightly"], "web2": ["nightly", "silver", "x"]}
        libvirtd.virsh("destroy", "web1")
        assert house.json("agent", "tags")[0]["tags"] == ["gold", "nightly"], "that it does not run changes nothing"
        libvirtd.virsh("undefine", "web1")
        told = house.run("agent", "tags", "--json")
        assert told.returncode == 0 and "web1 keeps the tags" in told.stderr and '"gold"' in told.stdout
    finally:
        house.close()


@pytest.mark.parametrize(
    ("inside", "tags"),
    [
        ("", ()),
        ("<title>#a,#b;#c</title><description>\n#d is#not #e.</description>", ("a", "b", "c", "d", "e.")),
        ("<description>#-x #\u00e9 ##y # z</description>", ()),
        ("<metadata><tags xmlns='urn:other'>gold</tags></metadata>", ()),
        (
            "<metadata><v:tags xmlns:v='urn:vmsnap:tags'>gold  gold\n../x --y a b</v:tags></metadata>",
            ("a", "b", "gold"),
        ),
    ],
)
def test_what_is_no_tag_is_left_out(inside: str, tags: tuple[str, ...]) -> None:
    assert tags_of(ET.fromstring(f"<domain>{inside}</domain>")) == tags
