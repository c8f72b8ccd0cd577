"""Domains that cannot be captured, or that are unusual, under a real libvirtd: each is told in one line, before
anything is touched; ``list-vms`` tells it of all of them, and touches none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="needs libvirt's Python binding: make .venv/.libvirt")

from tests.lab.certificates import Authority
from tests.lab.libvirtd import USER
from tests.lab.ports import free_port
from tests.lab.sshd import SshServer
from tests.libvirt_stage import Stage, staged
from tests.test_cli import BIN, Scripts
from vmsnap.errors import CannotCapture
from vmsnap.model import Disk, VmState
from vmsnap_drivers.hypervisors.libvirt.network_disks import note, on_network

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.timeout(900)]

DOMAIN = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><memory unit='MiB'>64</memory><os><type>hvm</type></os>
<features><acpi/></features><devices><emulator>{emulator}</emulator><memballoon model='none'/>{disk}{more}</devices>
{beside}</domain>"""
DISK = "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/><target dev='vda'/></disk>"
ABSENT_USB = """<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'><vendor id='0x1234'/>
<product id='0xbeef'/></source></hostdev>"""
"""A device that is not plugged in: libvirt starts QEMU with its place all the same."""
PULLED = "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>"


@pytest.fixture(scope="module")
def authority() -> Authority:
    """Who vouches for libvirtd, and for those whom it admits over TLS."""
    return Authority("the tests' own")


@pytest.fixture(scope="module")
def stage(authority: Authority) -> Iterator[Stage]:
    with staged(usb_bus=True, authority=authority) as made:
        made.controller.backup("vm001", made.repository)
        yield made


@pytest.fixture
def scripts(stage: Stage, tmp_path: Path) -> Scripts:
    made = Scripts(tmp_path)
    made.environment["VMSNAP_STATE_DIR"] = str(stage.controller.folders.state_dir)
    return made


@contextmanager
def domain(
    stage: Stage, name: str, *, persistent: bool = True, disk: bool = True, more: str = "", words: tuple[str, ...] = ()
) -> Iterator[None]:
    """A small machine without anything to boot, running."""
    image = stage.place / f"{name}.raw"
    image.write_bytes(bytes(8 << 20))
    definition = stage.place / f"{name}.xml"
    arguments = "".join(f"<qemu:arg value='{word}'/>" for word in words)
    definition.write_text(
        DOMAIN.format(
            name=name,
            emulator=stage.machine.qemu.wrapper,
            disk=DISK.format(image) if disk else "",
            more=more,
            beside=f"<qemu:commandline>{arguments}</qemu:commandline>",
        )
    )
    if persistent:
        stage.libvirtd.virsh("define", str(definition))
        stage.libvirtd.virsh("start", name)
    else:
        stage.libvirtd.virsh("create", str(definition))
    try:
        yield
    finally:
        stage.libvirtd.virsh("destroy", name)
        if persistent:
            stage.libvirtd.virsh("undefine", name)
        image.unlink()


def test_what_each_domain_can_do_is_listed_and_none_is_touched(stage: Stage, scripts: Scripts) -> None:
    shut = stage.place / "shut.xml"
    shut.write_text(DOMAIN.format(name="shut", emulator=stage.machine.qemu.wrapper, disk="", more="", beside=""))
    rest = stage.at_rest()
    stage.libvirtd.virsh("define", str(shut))
    listing = ("list-vms", "-o", f"uri={stage.libvirtd.uri}")
    try:
        with domain(stage, "fresh"), domain(stage, "stick", more=ABSENT_USB):
            found = {entry["vm"]: entry for entry in scripts.json(*listing, script="vmsnap-libvirt")}
            text = scripts.text(*listing, script="vmsnap-libvirt")
            # vm001 was asked through the monitor, by its backup.
            log = (stage.libvirtd.folder / "log" / "libvirtd.log").read_text()
            assert set(re.findall(r"name='(\S+)' .*is tainted: custom-monitor", log)) == {"vm001"}
    finally:
        stage.libvirtd.virsh("undefine", "shut")
    assert stage.at_rest() == rest
    entry = found["vm001"]
    assert (entry["seen"], entry["registered"], entry["state"], entry["live"]) == (True, True, "executing", True)
    assert entry["captures"] == ["cow", "libvirt"]
    assert [(disk["device"], disk["mechanism"]) for disk in entry["disks"]] == [("vda", "qcow2"), ("vdb", "qcow2")]
    assert entry["disks"][1]["address"] == str(stage.machine.disk_path(1))
    assert entry["why_not"] == ["pre-copy: under TCG, only its QEMU can say (vmsnap doctor vm001)"]
    assert (found["fresh"]["live"], found["fresh"]["registered"]) == (True, False)
    assert (found["shut"]["state"], found["shut"]["live"], found["shut"]["disks"]) == ("absent", False, [])
    assert found["shut"]["why_not"] == ["it does not run (virsh start shut)", "it has no disk that could be backed up"]
    assert not found["stick"]["live"] and found["stick"]["captures"] == []
    assert found["stick"]["why_not"] == [
        "hostdev0: a device of the host is passed through (usb 1234:beef), whose state cannot be captured"
    ]
    lines = text.splitlines()
    assert any(line.split()[:5] == ["vm001", "yes", "yes", "executing", "cow,"] for line in lines)
    assert any(line.split()[:5] == ["stick", "yes", "no", "executing", "no"] for line in lines)
    assert "shut: it does not run (virsh start shut)" in lines


def test_a_device_of_the_host_is_refused_in_one_line(stage: Stage, scripts: Scripts) -> None:
    with domain(stage, "stick", more=ABSENT_USB):
        scripts.json("vm", "add", "stick", "-o", f"uri={stage.libvirtd.uri}", script="vmsnap-libvirt")
        told = scripts.error(1, "backup", "stick", "-r", str(stage.place / "repository"), script="vmsnap-libvirt")
        findings = scripts.run("doctor", "stick", script="vmsnap-libvirt").stdout
        scripts.json("vm", "remove", "stick", script="vmsnap-libvirt")
    assert "hostdev0: a device of the host is passed through (usb 1234:beef), whose state cannot be captured" in told
    assert "hostdev0" in findings


def test_a_disk_that_libvirt_does_not_know_is_not_left_out_without_a_word(stage: Stage) -> None:
    image = stage.place / "hidden.raw"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o666)
    words = ("-drive", f"file={image},format=raw,if=none,id=hidden", "-device", "ide-hd,drive=hidden,bus=ide.1")
    with domain(stage, "half", words=words):
        stage.controller.add_vm("half", "libvirt", {**stage.options, "domain": "half"})
        with pytest.raises(CannotCapture, match=rf"a disk that libvirt does not know, {image} \(by <qemu:"):
            stage.controller.backup("half", stage.repository)
        stage.controller.remove_vm("half")
    image.unlink()


def refused_precopy(stage: Stage, name: str, lost: str) -> None:
    """A backup of a domain is refused in one line, as its QEMU would lose pages of those pieces of RAM."""
    stage.controller.add_vm("lossy", "libvirt", {**stage.options, "domain": name, "capture": "precopy"})
    rest, stored = stage.at_rest(), len(stage.repository.list())
    with pytest.raises(CannotCapture) as raised:
        stage.controller.backup("lossy", stage.repository)
    told = str(raised.value)
    assert told.startswith("-o capture=precopy cannot be: under TCG this QEMU loses track of pages written in ")
    assert lost in told and raised.value.cure == "use -o capture=cow" and "\n" not in told
    assert stage.at_rest() == rest and len(stage.repository.list()) == stored
    stage.controller.remove_vm("lossy")


def test_pre_copy_by_qemu_7_2_under_tcg_is_refused_in_one_line(stage: Stage) -> None:
    refused_precopy(stage, "vm001", "pc.ram; KVM, or QEMU 9.0, does not")


def test_wrong_names_have_exit_codes_of_their_own(stage: Stage, scripts: Scripts) -> None:
    uri = f"uri={stage.libvirtd.uri}"
    told = scripts.error(3, "vm", "add", "nobody", "-o", uri, script="vmsnap-libvirt")
    assert "no domain with matching name 'nobody'" in told and "virsh list --all" in told
    told = scripts.error(
        2, "vm", "add", "x", "-o", f"uri=qemu:///nope?socket={stage.libvirtd.socket}", script="vmsnap-libvirt"
    )
    assert "unexpected qemu URI path '/nope'" in told
    told = scripts.error(2, "list-vms", "-o", "uri=nothing", script="vmsnap-libvirt")
    assert "-o uri=…" in told
    told = scripts.error(2, "vm", "add", "other", "-o", uri, "-o", "memory=both", script="vmsnap-libvirt")
    assert "memory" in told and "monitor" in told and "supported" in told


def test_a_transient_domain_is_backed_up_and_comes_back_transient(stage: Stage, scripts: Scripts) -> None:
    controller = stage.controller
    with domain(stage, "fleeting", persistent=False):
        found = {
            e["vm"]: e for e in scripts.json("list-vms", "-o", f"uri={stage.libvirtd.uri}", script="vmsnap-libvirt")
        }
        assert (
            found["fleeting"]["notes"] == ["transient: libvirt forgets it when it ends"] and found["fleeting"]["live"]
        )
        controller.add_vm("fleeting", "libvirt", stage.options)
        backup = controller.backup("fleeting", stage.repository)
        assert backup.warnings == () and backup.capture == "cow"
        restored = controller.restore(stage.repository, backup.backup, "back", run=True, options=stage.options)
        driver = controller.drivers.hypervisor("libvirt", "back", restored.options)
        assert driver.state() is VmState.EXECUTING
        assert "back" in stage.libvirtd.virsh("list", "--all", "--transient", "--name").split()
        driver.destroy()
        driver.close()
        controller.remove_vm("back")
        controller.remove_vm("fleeting")
    assert "fleeting" not in stage.libvirtd.virsh("list", "--all", "--name").split()


def test_a_backup_job_of_somebody_else_is_respected(stage: Stage) -> None:
    job, folder = stage.place / "job.xml", stage.place / "job"
    folder.mkdir()
    shutil.chown(folder, USER)
    job.write_text(PULLED.format(folder / "job.sock"))
    stage.libvirtd.virsh("backup-begin", "vm001", str(job))
    driver = stage.controller.drivers.hypervisor("libvirt", "vm001", stage.options)
    try:
        with pytest.raises(
            CannotCapture, match=r"libvirt's job 'backup' of somebody else is going on \(virsh domjobinfo"
        ):
            stage.controller.backup("vm001", stage.repository)
        seen = {vm.vm: vm for vm in driver.see_vms()}["vm001"]
        assert not seen.captures and any("libvirt's job 'backup'" in reason for reason in seen.why_not)
        assert "Backup" in stage.libvirtd.virsh("domjobinfo", "vm001")
    finally:
        driver.close()
        stage.libvirtd.virsh("domjobabort", "vm001")
    assert stage.controller.backup("vm001", stage.repository).warnings == ()


def test_a_snapshot_of_somebody_else_is_kept(stage: Stage) -> None:
    virsh, controller, overlay = stage.libvirtd.virsh, stage.controller, stage.place / "overlay.qcow2"
    spec = ("--diskspec", f"vda,file={overlay}", "--diskspec", "vdb,snapshot=no")
    virsh("snapshot-create-as", "vm001", "theirs", "--disk-only", *spec)
    try:
        rest = stage.seen_by_virsh()
        (warning,) = controller.backup("vm001", stage.repository).warnings
        assert "disk vda was read whole" in warning and str(overlay) in warning
        assert stage.seen_by_virsh() == rest and "theirs" in rest["snapshot-list vm001 --name"]
        disk = controller.drivers.hypervisor("libvirt", "vm001", stage.options).describe().disks[0]
        assert disk.address == str(overlay)
    finally:
        virsh("blockcommit", "vm001", "vda", "--active", "--pivot", "--wait")
        virsh("snapshot-delete", "vm001", "theirs", "--metadata")
        overlay.unlink()
    assert len(controller.backup("vm001", stage.repository).warnings) == 1, "vda has its first image again"
    stage.machine.wait_for_check(stage.machine.latest_check() + 1)
    assert stage.machine.faults() == []


NETCAT = """#!{python}
import socket, sys, threading
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[-1])

def answers():
    while data := there.recv(65536):
        sys.stdout.buffer.raw.write(data)

threading.Thread(target=answers, daemon=True).start()
while data := sys.stdin.buffer.raw.read(65536):
    there.sendall(data)
"""
"""What libvirt has run on the other host, ``nc -U SOCKET``, which this machine has not."""


@pytest.mark.sshd
def test_over_ssh_domains_are_listed_and_captures_refused_in_one_line(stage: Stage, scripts: Scripts) -> None:
    """To a real sshd; the domain is this host's all the same, so that nothing but the way there is in the way."""
    with SshServer(stage.place / "ssh") as server:
        netcat, client = stage.place / "nc", stage.place / "ssh-client"
        netcat.write_text(NETCAT.format(python=sys.executable))
        client.write_text(f'#!/bin/sh\nexec ssh -F {server.config_file} "$@"\n')
        for path in (netcat, client):
            path.chmod(0o755)
        place = f"socket={stage.libvirtd.socket}&command={client}&netcat={netcat}&proxy=netcat"
        uri = f"uri=qemu+ssh://root@lab/system?{place}"
        seen = {vm["vm"]: vm for vm in scripts.json("list-vms", "-o", uri, script="vmsnap-libvirt")}
        assert seen["vm001"]["state"] == "executing"
        for name, more in (("far", ()), ("farther", ("-o", "memory=supported"))):
            words = ("-o", uri, "-o", "domain=vm001", *more)
            scripts.json("vm", "add", name, *words, script="vmsnap-libvirt")
            told = scripts.error(1, "backup", name, "-r", str(stage.place / "repository"), script="vmsnap-libvirt")
            assert f"VM '{name}' is reached over the network (qemu+ssh://…), over which QEMU cannot be handed" in told
            assert "and its disks lie there" in told and "run vmsnap on the VM's host" in told
            scripts.json("vm", "remove", name, script="vmsnap-libvirt")
    assert stage.machine.faults() == []


def test_over_tls_domains_are_listed_and_captures_refused_in_one_line(
    stage: Stage, scripts: Scripts, authority: Authority
) -> None:
    keys, listening = stage.place / "pki", f"localhost:{stage.libvirtd.tls_port}"
    authority.issue(keys, "client")
    options = ("-o", f"uri=qemu+tls://{listening}/system?pkipath={keys}")
    seen = {vm["vm"]: vm for vm in scripts.json("list-vms", *options, script="vmsnap-libvirt")}
    assert seen["vm001"]["state"] == "executing"
    scripts.json("vm", "add", "far", *options, "-o", "domain=vm001", script="vmsnap-libvirt")
    found = scripts.run("doctor", "far", script="vmsnap-libvirt").stdout
    assert "captures need a libvirt of this host" in found and "VM far: QEMU 7.2" in found
    told = scripts.error(1, "backup", "far", "-r", str(stage.place / "repository"), script="vmsnap-libvirt")
    assert "VM 'far' is reached over the network (qemu+tls://…), over which QEMU cannot be handed" in told
    scripts.json("vm", "remove", "far", script="vmsnap-libvirt")

    # Where the domain's processes are not seen, as they are not from another host.
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", str(BIN / "vmsnap-libvirt")]
    answers = [
        subprocess.run(
            [*elsewhere, *words, *options],
            env=scripts.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for words in (("list-vms",), ("vm", "add", "farther", "-o", "domain=vm001"))
    ]
    assert answers[0].returncode == 0 and "run vmsnap on the host" not in answers[0].stderr
    assert "vm001: no QEMU of domain" in answers[0].stdout
    assert answers[1].returncode == 1 and answers[1].stderr.count("\n") == 1
    assert "is seen on this host (run vmsnap on the host on which the domain runs)" in answers[1].stderr
    assert stage.machine.faults() == []


def test_what_is_wrong_with_tls_is_told_in_one_line(stage: Stage, scripts: Scripts, authority: Authority) -> None:
    listening, nobody = f"localhost:{stage.libvirtd.tls_port}", f"localhost:{free_port()}"
    known, strange, unsigned, empty = (stage.place / name for name in ("known", "strange", "unsigned", "empty"))
    authority.issue(known, "client")
    Authority("somebody else's").issue(strange, "client")
    for folder in (unsigned, empty):
        folder.mkdir()
    authority.vouch(unsigned)
    certificates = "see the certificates of both hosts"
    for host, keys, code, words in (
        (f"127.0.0.1:{stage.libvirtd.tls_port}", known, 2, ("does not match the hostname 127.0.0.1", certificates)),
        (listening, strange, 2, ("hasn't got a known issuer", certificates)),
        (listening, unsigned, 2, ("Unable to read TLS confirmation", certificates)),
        (listening, empty, 2, (f"certificate '{empty}/cacert.pem'", certificates)),
        (nobody, known, 1, ("Connection refused", "see whether libvirtd runs")),
    ):
        uri = f"uri=qemu+tls://{host}/system?pkipath={keys}"
        for verb in (("list-vms",), ("vm", "add", "far")):
            told = scripts.error(code, *verb, "-o", uri, script="vmsnap-libvirt")
            assert all(word in told for word in words), told


def test_freezing_is_refused_where_no_agent_answers(stage: Stage) -> None:
    channel = f"""<channel type='unix'><source mode='bind' path='{stage.place}/mute.sock'/>
        <target type='virtio' name='org.qemu.guest_agent.0'/></channel>"""
    options = {**stage.options, "fsfreeze": "yes"}
    for more, told in ((channel, "does not answer: "), ("", "has no channel org.qemu.guest_agent.0 for a guest agent")):
        with domain(stage, "mute", more=more):
            stage.controller.add_vm("mute", "libvirt", options)
            with pytest.raises(CannotCapture, match=told) as raised:
                stage.controller.backup("mute", stage.repository)
            assert "\n" not in str(raised.value) and "leave -o fsfreeze=yes out" in raised.value.cure
            driver = stage.controller.drivers.hypervisor("libvirt", "mute", options)
            (finding,) = [found for found in driver.doctor() if "fsfreeze" in found.subject]
            assert finding.severity == "missing" and told in finding.message
            assert driver.state() is VmState.EXECUTING
            driver.close()
            stage.controller.remove_vm("mute")


@pytest.mark.parametrize(("kind", "is_remote"), [("nfs4", True), ("nfs", True), ("cifs", True), ("ext4", False)])
def test_a_disk_on_another_host_s_file_system_is_told_by_the_type_of_it(kind: str, is_remote: bool) -> None:
    """This machine's kernel has no NFS: what a mount of it would be called is what is looked at."""
    assert on_network(kind) is is_remote
    text = note(Disk("vda", "/srv/nfs/web1.raw", 1 << 20), kind)
    assert text.startswith(f"vda lies on {kind}: ") and "\n" not in text
