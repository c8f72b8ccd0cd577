"""Domains of libvirt's own test hypervisor, ``test:///``, which needs no QEMU and no libvirtd: how they are found and
listed, what their definitions say, and how wrong ones are told. Nothing of it can be captured.
"""

from __future__ import annotations

import subprocess
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab.sshd import SshServer
from tests.test_cli import Scripts
from vmsnap.errors import HypervisorError, UnknownVm, UsageError
from vmsnap.host import HostFolders
from vmsnap.model import Disk, SeenVm, VmState
from vmsnap.roles import check_options
from vmsnap_drivers.hypervisors.libvirt import LibvirtHypervisor
from vmsnap_drivers.hypervisors.libvirt.definition import DefinedDisk, Definition
from vmsnap_drivers.hypervisors.libvirt.domain import reached
from vmsnap_drivers.hypervisors.libvirt.newdomain import NewDomain, rewrite
from vmsnap_drivers.hypervisors.libvirt.remote import is_remote
from vmsnap_drivers.hypervisors.libvirt.saveimage import head, stream_begin

pytestmark = pytest.mark.libvirt

DEFAULT = "test:///default"
UUID_OF_TEST = "6695eb01-f6a4-8304-79aa-97f2502e193f"
DISK = "<disk type='file' device='disk'><source file='/srv/{}.raw'/><target dev='vda' bus='virtio'/></disk>"
DOMAIN = """<domain type='test'><name>{}</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>{}{}
</devices></domain>"""
DEVICES = {
    "pci": """<hostdev mode='subsystem' type='pci' managed='yes'><source>
        <address domain='0x0000' bus='0x05' slot='0x02' function='0x1'/></source></hostdev>""",
    "usb": """<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source>
        </hostdev>""",
    "virtual-function": """<interface type='hostdev'><source>
        <address type='pci' domain='0x0000' bus='0x05' slot='0x03' function='0x0'/></source></interface>""",
    "tpm": "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
    "shared": "<disk type='block'><source dev='/dev/sdy'/><target dev='sdb' bus='scsi'/><shareable/></disk>",
    "lun": "<disk type='block' device='lun'><source dev='/dev/sdz'/><target dev='sda' bus='scsi'/></disk>",
}
TOLD = {
    "pci": "hostdev: a device of the host is passed through (pci 0000:05:02.1), whose state cannot be captured",
    "usb": "hostdev: a device of the host is passed through (usb 1234:beef), whose state cannot be captured",
    "virtual-function": "interface: its network card is of type hostdev, whose state cannot be captured",
    "tpm": "the TPM is the host's own (passthrough), whose state cannot be captured",
    "shared": "disk sdb is shared (<shareable/>) with others, who may write",
    "lun": "disk sda passes the guest's commands through to a device of the host (device='lun')",
}


def driver(folder: Path, vm: str, **options: str) -> LibvirtHypervisor:
    checked = check_options("libvirt", LibvirtHypervisor.options, options)
    return LibvirtHypervisor(vm, HostFolders.find(folder / "state").context(), checked)


def node(folder: Path, devices: dict[str, str]) -> str:
    """The URI of a test hypervisor with such domains."""
    path = folder / "node.xml"
    domains = "".join(DOMAIN.format(name, DISK.format(name), device) for name, device in devices.items())
    path.write_text(f"<node>{domains}</node>")
    return f"test://{path}"


def seen(folder: Path, uri: str) -> dict[str, SeenVm]:
    return {vm.vm: vm for vm in driver(folder, "any", uri=uri).see_vms()}


def test_domains_are_found_by_name_and_by_uuid(tmp_path: Path) -> None:
    with reached(DEFAULT) as domains:
        assert domains.find("test").uuid == domains.find(UUID_OF_TEST).uuid == UUID_OF_TEST
        assert [domain.name for domain in domains.all()] == ["test"]
        for name in ("nobody", "6695eb01-f6a4-8304-79aa-97f2502e1930"):
            with pytest.raises(UnknownVm, match="Domain not found"):
                domains.find(name)
    assert list(driver(tmp_path, "any", uri=DEFAULT).list_vms()) == ["test"]


def test_what_a_definition_forbids_is_told_of_each_domain(tmp_path: Path) -> None:
    found = seen(tmp_path, node(tmp_path, {"plain": "", **DEVICES}))
    assert set(found) == {"plain", *DEVICES}
    for name, vm in found.items():
        assert vm.state is VmState.EXECUTING and vm.captures == ()
        assert vm.why_not[0] == "it is a domain of TEST, not of QEMU"
        assert vm.why_not[1:] == ((TOLD[name],) if name in TOLD else ())
        assert vm.disks[0].address == f"/srv/{name}.raw"


def test_disks_on_the_network_have_addresses(tmp_path: Path) -> None:
    disk = """<disk type='network' device='disk'><source protocol='rbd' name='pool/image'>
        <host name='ceph1' port='6789'/></source><target dev='vdb' bus='virtio'/></disk>"""
    (vm,) = seen(tmp_path, node(tmp_path, {"far": disk})).values()
    assert [disk.address for disk in vm.disks] == ["/srv/far.raw", "rbd://ceph1:6789/pool/image"]


@pytest.mark.lab
@pytest.mark.sshd
def test_a_disk_on_a_mounted_file_system_of_another_host_is_told(tmp_path: Path) -> None:
    """Really mounted, by sshfs: of NFS this kernel has none."""
    exported, there = tmp_path / "exported", tmp_path / "there"
    exported.mkdir()
    there.mkdir()
    (exported / "web1.raw").write_bytes(bytes(1 << 20))
    path = tmp_path / "node.xml"
    disk = f"<disk type='file' device='disk'><source file='{there}/web1.raw'/><target dev='vda' bus='virtio'/></disk>"
    path.write_text(f"<node>{DOMAIN.format('web1', disk, '')}</node>")
    with SshServer(tmp_path / "ssh") as server:
        words = ["sshfs", "-F", str(server.config_file), f"lab:{exported}", str(there)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        try:
            (note,) = seen(tmp_path, f"test://{path}")["web1"].notes
        finally:
            subprocess.run(["umount", str(there)], check=True)
        assert note.startswith("vda lies on fuse.sshfs: while a backup lasts, ") and "\n" not in note
        assert seen(tmp_path, f"test://{path}")["web1"].notes == ()


def test_a_domain_of_another_hypervisor_is_told_in_one_line(tmp_path: Path) -> None:
    one = driver(tmp_path, "test", uri=DEFAULT)
    for ask in (one.describe, one.state):
        with pytest.raises(UsageError, match="drives TEST and not QEMU, whose domains alone can be captured") as raised:
            ask()
        assert "\n" not in str(raised.value) and raised.value.cure
    (finding,) = [found for found in one.doctor() if found.subject == "libvirt"]
    assert finding.severity == "missing" and "drives TEST" in finding.message


def test_the_command_lists_them(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path)
    listed = scripts.json("list-vms", "-o", f"uri={DEFAULT}", script="vmsnap-libvirt")
    assert [(e["vm"], e["seen"], e["registered"], e["live"], e["captures"]) for e in listed] == [
        ("test", True, False, False, [])
    ]
    assert "test: it is a domain of TEST, not of QEMU" in scripts.text(
        "list-vms", "-o", f"uri={DEFAULT}", script="vmsnap-libvirt"
    )
    told = scripts.error(2, "vm", "add", "test", "-o", f"uri={DEFAULT}", script="vmsnap-libvirt")
    assert "drives TEST" in told
    told = scripts.error(2, "list-vms", "-o", "uri=nothing", script="vmsnap-libvirt")
    assert "-o uri=…" in told


@pytest.mark.parametrize(
    ("uri", "remote"),
    [
        ("qemu:///system", False),
        ("qemu:///session?socket=/run/x", False),
        ("qemu+unix:///system", False),
        ("qemu+ssh://root@web1/system", True),
        ("qemu+ssh:///system", True),
        ("qemu://web1/system", True),
        ("qemu+tls://web1/system", True),
    ],
)
def test_a_uri_that_goes_over_the_network_passes_no_descriptors(tmp_path: Path, uri: str, remote: bool) -> None:
    assert is_remote(uri) is remote


WHO = "<initiator><iqn name='iqn.2009-12.com.example:web1'/></initiator>"
ACCOUNT = "<auth username='keeper'><secret type='iscsi' usage='web1'/></auth>"
LUN = """<domain type='qemu'><name>web1</name><uuid/><devices><disk type='network' device='disk'>
<source protocol='iscsi' name='iqn.2009-12.com.example:001/1'><host name='store' port='3260'/>{}</source>{}
<target dev='vda' bus='virtio'/></disk></devices></domain>"""


@pytest.mark.parametrize("xml", [LUN.format(WHO + ACCOUNT, ""), LUN.format(WHO, ACCOUNT)], ids=["in", "beside"])
def test_the_lun_of_a_duplicate_is_reached_by_the_name_and_the_account_of_the_first(tmp_path: Path, xml: str) -> None:
    definition = Definition(1, xml, "", "", (7, 2, 0), (DefinedDisk("vda", "iscsi://…", "raw", False),))

    def disk_at(address: str) -> ET.Element:
        new = NewDomain("bk", UUID_OF_TEST, tmp_path, {"vda": Disk("vda", address, 1 << 20)})
        (found,) = ET.fromstring(rewrite(xml, definition, new)).iter("disk")
        return found

    beside = disk_at("iscsi://store:3260/iqn.2009-12.com.example:bk/1")
    source = beside.find("source")
    assert source is not None and source.get("name") == "iqn.2009-12.com.example:bk/1"
    kept = ET.canonicalize(f"<source>{WHO}{ACCOUNT}</source>")
    source.remove(source[0])
    source.attrib.clear()
    assert ET.canonicalize(ET.tostring(source, encoding="unicode"), strip_text=True) == kept
    assert beside.find("auth") is None
    assert {element.tag for element in disk_at("/srv/vda.raw").iter()} == {"disk", "source", "target", "driver"}


def test_the_uuid_that_the_machine_shows_its_guest_is_the_new_one_too(tmp_path: Path) -> None:
    """As OpenStack has it. libvirt takes no definition in which they differ."""
    import libvirt

    old = "6695eb01-f6a4-8304-79aa-97f2502e1930"
    shown = f"<sysinfo type='smbios'><system><entry name='uuid'>{old}</entry></system></sysinfo><devices>"
    xml = DOMAIN.format("web1", "", "").replace("<devices>", shown).replace("<memory", f"<uuid>{old}</uuid><memory")
    new = str(uuid.uuid4())
    text = rewrite(xml, Definition(1, xml, "", "", (7, 2, 0), ()), NewDomain("bk", new, tmp_path))
    connection = libvirt.open(DEFAULT)
    with pytest.raises(libvirt.libvirtError, match="UUID mismatch"):
        connection.defineXML(xml.replace(old, new, 1).replace("web1", "differs"))
    assert connection.defineXML(text).UUIDString() == new and old not in text
    connection.close()


def test_where_the_stream_begins_in_what_libvirt_saved(tmp_path: Path) -> None:
    image = tmp_path / "image"
    begin = head("<domain/>", "<cpu/>")
    image.write_bytes(begin + b"QEVM")
    with image.open("rb") as file:
        assert stream_begin(file) == len(begin)
    compressed = bytearray(begin)
    compressed[28] = 1
    for content, message in (
        (bytes(compressed), "compressed image"),
        (b"LibvirtQemudPart" + begin[16:], "no complete image"),
        (begin[:50], "no complete image"),
    ):
        image.write_bytes(content)
        with image.open("rb") as file, pytest.raises(HypervisorError, match=message):
            stream_begin(file)
