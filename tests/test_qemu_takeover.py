"""The command line of a VM that takes the place of a dead one: what was the dead one's is its own now."""

from __future__ import annotations

import shlex
from pathlib import Path

from vmsnap_drivers.qemu.commandline import parse
from vmsnap_drivers.qemu.rewrite import NewVm, Rewritten, rewrite

RUN = Path("/state/qemu/run/vm001")
QMP = Path("/run/vm001.qmp")


def taken_over(text: str) -> Rewritten:
    new = NewVm(
        name="vm001",
        run_folder=RUN,
        qmp_socket=QMP,
        machine="pc-q35-7.2",
        disks=(),
        isolated=False,
        default_ram="pc.ram",
        takeover=True,
    )
    return rewrite("qemu-system-x86_64", parse(shlex.split(f"qemu-system-x86_64 {text}")), new)


def values(result: Rewritten, name: str) -> list[str | None]:
    return [argument.value for argument in parse(result.argv) if argument.name == name]


def test_it_has_the_name_and_the_monitors_of_the_dead_one() -> None:
    result = taken_over(
        "-name guest=web,debug-threads=on -qmp unix:/run/vm001.qmp,server,nowait"
        " -qmp unix:/run/other.qmp,server,nowait -qmp tcp:127.0.0.1:4444,server -monitor stdio -vnc :3"
    )
    assert values(result, "name") == ["web,debug-threads=on"]
    assert values(result, "qmp") == [
        "unix:/run/other.qmp,server=on,wait=off",
        "unix:/run/vm001.qmp,server=on,wait=off",
    ]
    assert "-monitor stdio" not in " ".join(result.argv)
    assert values(result, "vnc") == [":3"]
    assert values(taken_over("-m 64"), "name") == ["vm001"]


def test_sockets_are_where_they_were_and_logs_go_on() -> None:
    result = taken_over(
        "-chardev socket,id=s,path=/run/serial.sock,server,nowait,logfile=/var/log/serial.log"
        " -chardev file,id=f,path=/var/log/f.log -chardev pipe,id=p,path=/run/p"
        " -chardev socket,id=q,path=/run/vm001.qmp,server=on -chardev tty,id=t,path=/dev/ttyS0"
        " -serial unix:/run/legacy.sock,server -serial file:/var/log/legacy.log"
    )
    assert values(result, "chardev") == [
        "socket,id=s,path=/run/serial.sock,logfile=/var/log/serial.log,logappend=on,server=on,wait=off",
        "file,id=f,path=/var/log/f.log,append=on",
        "null,id=p",
        f"socket,id=q,path={RUN}/2-vm001.qmp,server=on,wait=off",
        "null,id=t",
    ]
    # A file of the short form cannot be told to go on; it would be begun anew.
    assert values(result, "serial") == ["unix:/run/legacy.sock,server=on,wait=off", f"file:{RUN}/legacy.log"]


def test_its_networks_are_those_of_the_dead_one() -> None:
    for network in (
        "tap,id=n,ifname=vnet3,script=no,downscript=no",
        "user,id=n,hostfwd=tcp::2222-:22",
        "socket,id=n,listen=:1234",
    ):
        result = taken_over(f"-netdev {network} -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:01")
        assert values(result, "netdev") == [network]
        assert values(result, "device") == ["virtio-net-pci,netdev=n,mac=52:54:00:00:00:01"]
        assert result.notes == []
    handed_over = taken_over("-netdev tap,id=n,fd=27")
    assert "fd=27" not in " ".join(handed_over.argv)
    assert "connected to nothing" in handed_over.notes[0]
