"""What cannot be captured truthfully is refused with one line each, before anything is done: told by the options."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vmsnap_drivers.qemu.commandline import parse
from vmsnap_drivers.qemu.refusals import of_argument, of_nodes


def refused(text: str, cwd: str = "/") -> list[str]:
    return [line for argument in parse(shlex.split(f"qemu {text}")) for line in of_argument(argument, cwd)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("-device vfio-pci,host=01:00.0,id=card", "vfio-pci 'card' writes to memory and disks behind"),
        ("""-device '{"driver":"vfio-pci","host":"01:00.0","id":"card"}'""", "vfio-pci 'card' writes"),
        ("-device vhost-user-blk-pci,chardev=c,id=disk", "vhost-user-blk-pci 'disk' writes"),
        ("-netdev vhost-user,id=net,chardev=c", "vhost-user 'net' writes"),
        ("-netdev vhost-vdpa,id=net,vhostdev=/dev/vhost-vdpa-0", "vhost-vdpa 'net' writes"),
        ("-device vhost-scsi-pci,id=scsi,wwpn=naa.1", "vhost-scsi-pci 'scsi' writes"),
        ("-device ivshmem-plain,memdev=m,id=shared", "ivshmem-plain 'shared' writes"),
        ("-device scsi-block,drive=d,id=tape", "scsi-block 'tape' passes the guest's commands through"),
        ("-device scsi-generic,drive=d,id=tape", "scsi-generic 'tape' passes"),
        ("-add-fd fd=3,set=2", "open files with -add-fd"),
        ("-object memory-backend-file,id=ram,size=1G,mem-path=/dev/shm/ram,pmem=on", "'ram' is persistent memory"),
    ],
)
def test_each_kind_has_its_line(text: str, told: str) -> None:
    (line,) = refused(text)
    assert told in line
    assert "\n" not in line


def test_ram_in_an_ordinary_file_is_told_from_ram_in_memory(tmp_path: Path) -> None:
    backend = "-object memory-backend-file,id=ram,size=1G,mem-path="
    (line,) = refused(f"{backend}ram.img", str(tmp_path))
    assert line.endswith(f"({tmp_path}/ram.img), not in memory")
    assert refused(f"{backend}/dev/shm/ram.img") == []
    assert (
        refused("-object memory-backend-memfd,id=ram,size=1G,hugetlb=on -object memory-backend-ram,id=r,size=1G") == []
    )


@pytest.mark.parametrize(
    "text",
    [
        "-device virtio-blk-pci,drive=d -device scsi-hd,drive=e -device virtio-scsi-pci -device nvme,drive=f,serial=1",
        "-netdev user,id=n -netdev tap,id=t,vhost=on -device virtio-net-pci,netdev=n",
        "-chardev socket,id=c,path=/s -tpmdev emulator,id=tpm0,chardev=c -device tpm-crb,tpmdev=tpm0",
    ],
)
def test_what_can_be_captured_is_not_refused(text: str) -> None:
    assert refused(text) == []


@pytest.mark.parametrize("driver", ["nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user"])
def test_a_disk_whose_data_come_into_memory_past_qemu_is_told_by_its_node(driver: str) -> None:
    """What QEMU says of its nodes; it opens such a one only where there is the device."""
    nodes = [{"node-name": "disk0", "drv": "raw"}, {"node-name": "disk0-storage", "drv": driver}]
    (line,) = of_nodes(nodes)
    assert line == f"the block node 'disk0-storage' ({driver}) has data moved into the guest's memory past QEMU"


def test_disks_in_files_and_behind_networks_are_not() -> None:
    assert of_nodes([{"node-name": name, "drv": name} for name in ("file", "host_device", "iscsi", "nbd", "raw")]) == []
