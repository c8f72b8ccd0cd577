"""QEMU command lines as people write them: parsed, and rewritten for a VM that is brought back."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from vmsnap.errors import UsageError
from vmsnap_drivers.hypervisors.qemu.definition import without_secrets
from vmsnap_drivers.qemu.commandline import Argument, Properties, parse, split, to_argv
from vmsnap_drivers.qemu.configuration_file import parse_configuration
from vmsnap_drivers.qemu.device_state import slirp_instances
from vmsnap_drivers.qemu.disk_arguments import with_image, without_image
from vmsnap_drivers.qemu.drive_names import drive_names, keys_of_name
from vmsnap_drivers.qemu.rewrite import NewDisk, NewVm, Rewritten, rewrite

RUN = Path("/run/vmsnap/vm002")


NEW = NewVm("vm002", RUN, RUN / "qmp.sock", "pc-i440fx-7.2", (), isolated=True)


def arguments(text: str) -> list[Argument]:
    return parse(shlex.split(f"qemu-system-x86_64 {text}"))


def rewritten(
    text: str,
    *disks: NewDisk,
    isolated: bool = True,
    images: dict[str, Path] | None = None,
    default_ram: str = "pc.ram",
    take_images: bool = False,
) -> Rewritten:
    new = NewVm(
        name="vm002",
        run_folder=RUN,
        qmp_socket=RUN / "qmp.sock",
        machine="pc-q35-7.2",
        disks=disks,
        isolated=isolated,
        images=images or {},
        take_images=take_images,
        block_sizes={name: 1 << 30 for name in images or {}},
        default_ram=default_ram,
    )
    return rewrite("qemu-system-x86_64", arguments(text), new)


def values(result: Rewritten, name: str) -> list[str | None]:
    return [argument.value for argument in parse(result.argv) if argument.name == name]


@pytest.mark.parametrize(
    "text",
    [
        "-name vm001,debug-threads=on -S -m 512 -nodefaults",
        "-drive file=/a,,b.img,if=virtio,format=raw -cdrom /x.iso",
        "disk.img -snapshot -hdb other.img",
        """-blockdev '{"driver":"file","node-name":"f","filename":"/a b"}' -device '{"driver":"virtio-blk-pci"}'""",
        "-chardev socket,id=c,path=/s,server,nowait -mon chardev=c,mode=control -enable-kvm -smp 2",
        "-append 'console=ttyS0 root=/dev/vda' -kernel k -initrd i",
    ],
)
def test_what_is_parsed_is_written_as_it_was(text: str) -> None:
    argv = ["qemu", *shlex.split(text)]
    assert to_argv("qemu", parse(argv)) == argv


def test_two_dashes_are_as_good_as_one() -> None:
    assert arguments("--name vm --nodefaults") == [Argument("name", "vm"), Argument("nodefaults")]


def test_an_option_without_its_value_is_refused() -> None:
    with pytest.raises(UsageError, match="-drive lacks its value"):
        arguments("-S -drive")


def test_doubled_commas_are_commas_of_the_value() -> None:
    assert split("file=/a,,b,,,id=x") == ["file=/a,b,", "id=x"]
    properties = Properties.parse("file=/a,,b,if=none")
    assert properties.get("file") == "/a,b"
    assert properties.text() == "file=/a,,b,if=none"


def test_switches_implied_keys_and_nested_keys() -> None:
    properties = Properties.parse("socket,id=c,server,nowait", "backend")
    assert properties.get("backend") == "socket"
    assert properties.get("server") == "on"
    assert properties.get("wait") == "off"
    assert properties.without("wait").set("path", "/p").text() == "socket,id=c,server,path=/p"
    tree = Properties.parse('{"driver": "qcow2", "file": {"driver": "file", "filename": "/a"}, "read-only": true}')
    assert tree.get("file.filename") == "/a"
    assert tree.get("read-only") == "on"
    assert tree.names == ["driver", "file.driver", "file.filename", "read-only"]
    assert json.loads(tree.set("file.filename", "/b").without("read-only").text())["file"]["filename"] == "/b"


def test_damaged_json_is_refused() -> None:
    with pytest.raises(UsageError, match="damaged JSON"):
        Properties.parse('{"driver"')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-drive file=/a,id=d0,if=none -drive file=/b,id=d1,if=none", {"d0": 0, "d1": 1}),
        ("-drive file=/a,if=virtio -drive file=/b,if=virtio", {"virtio0": 0, "virtio1": 1}),
        ("-m 1G -hda /a -cdrom /c", {"ide0-hd0": 1, "ide1-cd0": 2}),
        ("/a -m 1G", {"ide0-hd0": 0}),
        ("-drive file=/a -drive file=/b -drive file=/c,media=cdrom", {"ide0-hd0": 0, "ide0-hd1": 1, "ide1-cd0": 2}),
        ("-drive if=ide,bus=1,unit=1,file=/a -fdb /f", {"ide1-hd1": 0, "floppy1": 1}),
        ("-drive if=pflash,unit=0,file=/a -pflash /b", {"pflash0": 0, "pflash1": 1}),
        ("-blockdev file,node-name=f,filename=/a -m 1G", {}),
    ],
)
def test_drives_without_an_id_have_the_names_that_qemu_gives_them(text: str, expected: dict[str, int]) -> None:
    assert drive_names(arguments(text), ide_units=2) == expected


def test_a_bus_of_q35_has_one_drive() -> None:
    assert drive_names(arguments("-hda /a -hdb /b -cdrom /c"), ide_units=1) == {
        "ide0-hd0": 0,
        "ide1-hd0": 1,
        "ide2-cd0": 2,
    }


@pytest.mark.parametrize("name", ["ide1-cd0", "ide0-hd1", "virtio3", "floppy0", "pflash1", "extra"])
def test_the_keys_of_a_name_make_a_drive_of_that_name(name: str) -> None:
    keys = ",".join(f"{key}={value}" for key, value in keys_of_name(name).items())
    assert drive_names(arguments(f"-drive {keys}"), ide_units=2) == {name: 0}


def test_a_drive_without_its_medium_is_the_same_drive() -> None:
    (argument,) = arguments("-cdrom /a")
    assert without_image(argument) == Argument("drive", "index=2,media=cdrom")
    (argument,) = arguments("-drive if=none,id=cd,media=cdrom,file=/a,format=raw,cache=none")
    assert without_image(argument) == Argument("drive", "if=none,media=cdrom,id=cd")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-drive file=/a,format=qcow2,if=virtio,id=x,cache=none", "file=/new,,1,format=raw,if=virtio,id=x,cache=none"),
        ("-hdb /a", "file=/new,,1,format=raw,media=disk,index=1"),
        ("/a", "file=/new,,1,format=raw,media=disk,index=0"),
        ("-pflash /a", "file=/new,,1,format=raw,if=pflash"),
        ("-fda /a", "file=/new,,1,format=raw,if=floppy,index=0"),
    ],
)
def test_a_drive_gets_another_image_and_stays_the_same_device(text: str, expected: str) -> None:
    (argument,) = arguments(text)
    assert with_image(argument, "/new,1", "raw") == Argument("drive", expected)


def test_a_node_gets_another_image_under_its_name() -> None:
    (argument,) = arguments("-blockdev driver=qcow2,node-name=d,file.driver=file,file.filename=/a,discard=unmap")
    node = json.loads(with_image(argument, "/dev/vg0/new", "raw").value or "")
    assert node == {
        "node-name": "d",
        "driver": "raw",
        "discard": "unmap",
        "file": {"driver": "host_device", "filename": "/dev/vg0/new"},
    }
    remote = json.loads(with_image(argument, "iscsi://host:3260/iqn.2009-12.com.example:001/1", "raw").value or "")
    assert remote["file"] == {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": "host:3260",
        "target": "iqn.2009-12.com.example:001",
        "lun": 1,
    }


FILE = "aio=native,cache.direct=on"


@pytest.mark.parametrize(
    "text",
    [
        f"-blockdev host_device,node-name=d,filename=/dev/sda,discard=unmap,{FILE}",
        f"-blockdev file,node-name=f,filename=/a,{FILE} -blockdev raw,node-name=d,file=f,discard=unmap",
        "-blockdev raw,node-name=d,discard=unmap,file.driver=file,file.filename=/a,file.aio=native"
        ",file.cache.direct=on",
        """-blockdev '{"driver":"file","filename":"/a","node-name":"d","discard":"unmap","aio":"native",'"""
        """'"cache":{"direct":true},"read-only":false}'""",
    ],
)
def test_how_a_file_is_reached_is_kept_wherever_its_options_stand(text: str) -> None:
    *others, argument = arguments(text)
    node = json.loads(with_image(argument, "/new", "raw", others).value or "")
    assert node.pop("read-only", False) is False
    assert node == {
        "node-name": "d",
        "driver": "raw",
        "discard": "unmap",
        "file": {"driver": "file", "filename": "/new", "aio": "native", "cache": {"direct": True}},
    }


CHAP = "user=keeper,password-secret=chap,initiator-name=iqn.2009-12.com.example:vm,timeout=9"


@pytest.mark.parametrize(
    "text",
    [
        f"-blockdev driver=iscsi,node-name=f,portal=old,target=t,lun=1,{CHAP} -blockdev raw,node-name=d,file=f",
        f"-blockdev driver=iscsi,node-name=d,portal=old,target=t,lun=1,{CHAP}",
        "-blockdev raw,node-name=d,file.driver=iscsi,file.portal=old,file.target=t,"
        + ",".join(f"file.{pair}" for pair in CHAP.split(",")),
    ],
)
def test_a_disk_that_moves_to_another_lun_keeps_its_account_and_no_other_disk_gets_it(text: str) -> None:
    *others, argument = arguments(text)
    lun = json.loads(
        with_image(argument, "iscsi://host:3260/iqn.2009-12.com.example:bk001/1", "raw", others).value or ""
    )
    assert lun["file"] == {
        "driver": "iscsi", "transport": "tcp", "portal": "host:3260", "target": "iqn.2009-12.com.example:bk001",
        "lun": 1, "user": "keeper", "password-secret": "chap", "initiator-name": "iqn.2009-12.com.example:vm",
        "timeout": 9,
    }  # fmt: skip
    file = json.loads(with_image(argument, "/new", "raw", others).value or "")
    assert file["file"] == {"driver": "file", "filename": "/new"}
    (drive,) = arguments(
        "-drive file.driver=iscsi,file.portal=old,file.target=t,file.user=u,file.password-secret=c,if=virtio"
    )
    assert with_image(drive, "iscsi://host/iqn.x.y:z/1", "raw").value == (
        "file=iscsi://host/iqn.x.y:z/1,format=raw,if=virtio,file.user=u,file.password-secret=c"
    )
    (drive,) = arguments("-drive driver=iscsi,portal=old,target=t,user=u,password-secret=c,if=virtio")
    assert with_image(drive, "iscsi://host/iqn.x.y:z/1", "raw").value == (
        "file=iscsi://host/iqn.x.y:z/1,format=raw,if=virtio,file.user=u,file.password-secret=c"
    )


def test_nodes_below_a_replaced_disk_are_left_out_and_shared_ones_stay() -> None:
    result = rewritten(
        "-blockdev file,node-name=f0,filename=/a -blockdev raw,node-name=d0,file=f0"
        " -blockdev file,node-name=base,filename=/base -blockdev qcow2,node-name=d1,file.driver=file,backing=base"
        " -blockdev file,node-name=iso,filename=/iso,read-only=on",
        NewDisk(1, "d0", "/new/a", "raw"),
    )
    names = [Properties.parse(value or "").get("node-name") for value in values(result, "blockdev")]
    assert names == ["d0", "base", "d1", "iso"]


def test_it_waits_stopped_under_its_own_name_and_monitor() -> None:
    result = rewritten("-name guest=vm001,debug-threads=on -qmp unix:/old.sock,server=on,wait=off -daemonize -S")
    assert values(result, "name") == ["vm002,debug-threads=on"]
    assert values(result, "qmp") == ["unix:/run/vmsnap/vm002/qmp.sock,server=on,wait=off"]
    assert values(result, "incoming") == ["defer"]
    assert values(result, "S") == [None]
    assert "-daemonize" not in result.argv


@pytest.mark.parametrize(
    "text", ["-machine q35,accel=kvm", "-M q35,accel=kvm", "-machine type=q35,accel=kvm", "-machine accel=kvm,type=q35"]
)
def test_the_machine_type_gets_its_version(text: str) -> None:
    (machine,) = [a for a in parse(rewritten(text).argv) if a.name in ("machine", "M")]
    assert machine.properties.get("type") == "pc-q35-7.2"
    assert machine.properties.get("accel") == "kvm"


def test_the_machine_type_is_named_where_it_was_not() -> None:
    assert values(rewritten("-m 1G"), "machine") == ["pc-q35-7.2"]


def test_ram_is_mapped_from_its_image() -> None:
    result = rewritten("-machine q35 -m 1G -mem-prealloc -mem-path /dev/hugepages", images={"pc.ram": Path("/i,m")})
    assert values(result, "machine") == ["pc-q35-7.2,memory-backend=pc.ram"]
    assert values(result, "object") == ["memory-backend-file,id=pc.ram,mem-path=/i,,m,share=off,size=1073741824"]
    assert "-mem-prealloc" not in result.argv
    assert "-mem-path" not in result.argv


def test_ram_of_a_backend_is_never_the_originals() -> None:
    text = "-machine q35,memory-backend=m0 -object memory-backend-file,id=m0,mem-path=/dev/shm/old,size=1G,share=on"
    assert values(rewritten(text, default_ram=""), "object") == ["memory-backend-ram,id=m0,size=1G"]
    mapped = rewritten(text, default_ram="", images={"m0": Path("/image")}, take_images=True)
    assert values(mapped, "object") == ["memory-backend-file,id=m0,mem-path=/image,share=on,size=1073741824"]


def test_sockets_and_files_move_into_its_own_folder() -> None:
    result = rewritten(
        "-chardev socket,id=a,path=/old/qmp.sock,server,nowait -chardev socket,id=b,path=/else/a.sock,server=on"
        " -chardev file,id=c,path=/old/log,logfile=/old/log2 -pidfile /old/pid -serial unix:/old/ser,server,nowait"
        " -serial file:/old/serial.txt"
    )
    chardevs = [Properties.parse(value or "", "backend") for value in values(result, "chardev")]
    assert [c.get("path") for c in chardevs] == [f"{RUN}/2-qmp.sock", f"{RUN}/a.sock", f"{RUN}/log"]
    assert chardevs[0].get("server") == chardevs[1].get("server") == "on"
    assert chardevs[0].get("wait") == chardevs[1].get("wait") == "off"
    assert chardevs[2].get("logfile") == f"{RUN}/log2"
    assert values(result, "pidfile") == [f"{RUN}/qemu.pid"]
    assert values(result, "serial") == [f"unix:{RUN}/ser,server=on,wait=off", f"file:{RUN}/serial.txt"]


@pytest.mark.parametrize(
    "text",
    ["socket,id=a,path=/srv.sock", "socket,id=a,host=h,port=1", "udp,id=a,port=1", "pipe,id=a,path=/p", "stdio,id=a"],
)
def test_a_character_device_that_reaches_out_is_connected_to_nothing(text: str) -> None:
    assert values(rewritten(f"-chardev {text}"), "chardev") == ["null,id=a"]


def test_legacy_monitors_displays_and_debuggers_are_dropped() -> None:
    result = rewritten(
        "-monitor stdio -vnc :1 -spice port=1 -gdb tcp::1 -s -nographic -D /log -loadvm x -incoming tcp:0:1"
    )
    assert {argument.name for argument in parse(result.argv)} == {
        "serial", "parallel", "net", "monitor", "machine", "name", "display", "qmp", "incoming", "S",
        "netdev", "pidfile",
    }  # fmt: skip
    assert values(result, "serial") == ["null"]
    assert values(result, "display") == ["none"]


def test_an_isolated_vm_has_no_way_out() -> None:
    result = rewritten(
        "-netdev user,id=n0,hostfwd=tcp::22-:22 -netdev tap,id=n1,ifname=vnet0,vhost=on -nic bridge,br=br0,model=e1000"
        ' -netdev \'{"type":"vde","id":"n2"}\' -net user -net nic -nic none'
    )
    assert values(result, "netdev") == [
        "hubport,hubid=1001,id=n0",
        "tap,id=n1,script=no,downscript=no,vhost=off",
        "hubport,hubid=1002,id=n2",
        "user,id=vmsnap-slirp0,restrict=on",
        "user,id=vmsnap-slirp2,restrict=on",
    ]
    assert values(result, "nic") == ["tap,model=e1000,script=no,downscript=no,vhost=off", "none"]
    assert values(result, "net") == ["nic"]


def test_a_vm_that_is_not_isolated_keeps_its_network_without_forwarded_ports() -> None:
    result = rewritten("-netdev user,id=n0,hostfwd=tcp::22-:22 -netdev tap,id=n1,fd=5", isolated=False)
    assert values(result, "netdev") == ["user,id=n0", "tap,id=n1,script=no,downscript=no,vhost=off"]
    assert len(result.notes) == 2


@pytest.mark.parametrize("isolated", [True, False])
def test_nothing_of_the_original_is_begun_anew_or_taken_over(isolated: bool) -> None:
    result = rewritten(
        "-object filter-dump,id=f,netdev=n0,file=/old/orig.pcap -audiodev wav,id=a,path=/old/orig.wav"
        " -netdev stream,id=n0,server=on,addr.type=unix,addr.path=/run/switch -run-with chroot=/jail,async-teardown=on",
        isolated=isolated,
    )
    assert "/old/" not in " ".join(result.argv)
    assert "/run/switch" not in " ".join(result.argv)
    assert values(result, "netdev") == ["hubport,hubid=1001,id=n0"]
    assert values(result, "run-with") == ["async-teardown=on"]


def test_a_shared_folder_is_read_only_for_an_isolated_vm() -> None:
    (folder,) = values(rewritten("-fsdev local,id=s,path=/srv,security_model=none"), "fsdev")
    assert Properties.parse(folder or "", "fsdriver").get("readonly") == "on"


@pytest.mark.parametrize(
    "text",
    [
        "-drive file=https://user:word@host/disk.img",
        "-drive file=rbd:pool/image:id=admin:key=AQ==",
        '-blockdev {"driver":"iscsi","node-name":"d","password":"word"}',
        "-drive driver=https,file.password=word",
        "-iscsi user=u,password=word",
    ],
)
def test_a_password_in_an_option_is_cut_out_and_told(text: str) -> None:
    cleaned, found = without_secrets(parse(["qemu", *text.split(" ", 1)]))
    assert len(found) == 1
    assert "word" not in str(cleaned) + str(found).replace("password", "")
    assert "AQ==" not in str(cleaned)


def test_a_reference_to_a_secret_is_no_secret() -> None:
    arguments = parse(
        ["qemu", "-drive", "driver=https,file.password-secret=sec0,file.url=https://host/x", "-vnc", ":1,password=on"]
    )
    assert without_secrets(arguments)[1] == []


def test_what_the_guest_sees_stays() -> None:
    hardware = (
        "-uuid 1 -smp 2 -cpu host -m 1G -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:01,addr=0x5 -rtc base=utc"
    )
    assert " ".join(rewritten(hardware).argv).startswith(f"qemu-system-x86_64 {hardware}")


def test_secrets_are_cut_out_and_named() -> None:
    cleaned, found = without_secrets(
        arguments(
            "-object secret,id=k,data=hunter2 -object secret,id=f,file=/key -spice port=1,password=hunter2"
            " -drive file=iscsi://me%hunter2@host/iqn/1"
        )
    )
    assert len(found) == 3
    assert "hunter2" not in " ".join(str(argument) for argument in cleaned) + "".join(found)
    assert cleaned[1].value == "secret,id=f,file=/key"


def test_networks_keep_the_numbers_that_they_have_in_the_device_state() -> None:
    new = replace(NEW, slirp_instances=(1, 3), isolated=False)
    result = rewrite("qemu", arguments("-netdev user,id=n1 -netdev tap,id=t -netdev user,id=n3"), new)
    names = [Properties.parse(value or "", "type").get("id") for value in values(result, "netdev")]
    assert names == ["vmsnap-gone0", "n1", "t", "vmsnap-gone2", "n3"]


def test_the_numbers_of_networks_are_found_in_a_device_state(tmp_path: Path) -> None:
    state = tmp_path / "device-state"
    header = b"\x04\x00\x00\x00\x2a\x05slirp\x00\x00\x00%c\x00\x00\x00\x04"
    state.write_bytes(b"\x7e...." + header % 3 + b"content slirp\x00\x00\x00\x07" + header % 1)
    assert slirp_instances(state) == (1, 3)


def test_a_tpm_gets_a_socket_of_its_own() -> None:
    result = rewritten(
        "-chardev socket,id=t,path=/old/tpm -tpmdev emulator,id=tpm0,chardev=t -device tpm-crb,tpmdev=tpm0"
    )
    assert values(result, "chardev") == [f"socket,id=t,path={RUN}/tpm.sock"]


def test_a_configuration_file_stands_for_options() -> None:
    text = """# qemu
[machine]
  type = "q35"
[memory]
  size = "1G"

[drive "d0"]
  file = "/a,b.img"
  if = "none"
[device "disk"]
  driver = "virtio-blk-pci"
  drive = "d0"
"""
    found = parse_configuration(text)
    assert found == [
        Argument("machine", "type=q35"),
        Argument("m", "size=1G"),
        Argument("drive", "id=d0,file=/a,,b.img,if=none"),
        Argument("device", "id=disk,driver=virtio-blk-pci,drive=d0"),
    ]
    with pytest.raises(UsageError, match="line 2 is no group"):
        parse_configuration("[machine]\ntype = q35\n")
