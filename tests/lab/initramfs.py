"""Builds what the guest boots: Debian's cloud kernel and an initramfs of busybox, drivers and workload."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .qemus import cache_folder, unpacked

_SOURCES = Path(__file__).parent / "guest"
_BUSYBOX = Path("/bin/busybox")
_COMPILE = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
# Programs of their own, started where asked for; each with the libraries it needs.
_PROGRAMS = {"application": ("-s", "-Wl,--no-warnings", "-lsqlite3", "-lm"), "packets": ("-s",)}

# Each needs those before it.
_MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/acpi/button",
    "drivers/input/evdev",
)
_CONTROLLER_MODULES = (
    "drivers/scsi/scsi_common",
    "drivers/scsi/scsi_mod",
    "drivers/scsi/virtio_scsi",
    "drivers/scsi/sd_mod",
    "drivers/ata/libata",
    "drivers/ata/ata_piix",
)
_NETWORK_MODULES = ("net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net")
_AGENT_MODULE = "drivers/char/virtio_console"
_LISTS = {"order": _MODULES, "controllers": _CONTROLLER_MODULES, "network": _NETWORK_MODULES}


@dataclass(frozen=True)
class GuestImage:
    """What ``-kernel`` and ``-initrd`` get."""

    kernel: Path
    initramfs: Path


def guest_image(*, agent: bool = False) -> GuestImage:
    """The guest, built at the first call and whenever something that it is made of changed.

    :param agent: with QEMU's guest agent, which the others would only carry along.
    :raise LookupError: when the kernel is not in the cache; the message says how to get it.
    :raise subprocess.CalledProcessError: when the workload does not compile.
    """
    kernels = sorted((cache_folder() / "kernel/boot").glob("vmlinuz-*"))
    if not kernels:
        raise LookupError("no guest kernel in the cache: run tests/lab/install.sh as root")
    kernel = kernels[-1]
    modules = cache_folder() / "kernel/lib/modules" / kernel.name.removeprefix("vmlinuz-") / "kernel"
    initramfs = cache_folder() / f"initramfs-{_fingerprint(kernel)}.cpio"
    if not initramfs.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="build-") as folder:
            built = _build(Path(folder), modules)
            built.replace(initramfs)
    if not agent:
        return GuestImage(kernel, initramfs)
    longer = initramfs.with_suffix(".agent.cpio")
    if not longer.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="build-") as folder:
            added = _build_agent(Path(folder), modules)
            # The kernel takes several archives, one behind the other.
            added.write_bytes(initramfs.read_bytes() + added.read_bytes())
            added.replace(longer)
    return GuestImage(kernel, longer)


def _fingerprint(kernel: Path) -> str:
    made_of = (kernel.name, _LISTS, _AGENT_MODULE, _COMPILE, _PROGRAMS)
    digest = hashlib.sha256(repr(made_of).encode())
    for path in [_BUSYBOX, *sorted(path for path in _SOURCES.rglob("*") if path.is_file())]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(folder: Path, modules: Path) -> Path:
    root = folder / "root"
    for name in ("bin", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin/busybox")
    shutil.copy(_SOURCES / "init", root / "init")
    (root / "init").chmod(0o755)
    for name, wanted in _LISTS.items():
        for module in wanted:
            shutil.copy(modules / f"{module}.ko", root / "modules")
        (root / "modules" / name).write_text("\n".join(Path(module).name for module in wanted) + "\n")
    sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
    subprocess.run([*_COMPILE, "-o", str(root / "workload"), *sources], check=True)
    for program, libraries in _PROGRAMS.items():
        source = str(_SOURCES / "programs" / f"{program}.c")
        subprocess.run([*_COMPILE, "-o", str(root / program), source, *libraries], check=True)
    return _archive(root, folder / "initramfs.cpio")


def _build_agent(folder: Path, modules: Path) -> Path:
    """An archive of the agent with the libraries that it is linked with, and the driver of its port."""
    agent = unpacked("agent", "guest agent of QEMU's")
    place = folder / "root" / "agent"
    (place / "lib").mkdir(parents=True)
    program = agent / "usr/sbin/qemu-ga"
    shutil.copy(program, place)
    shutil.copy(modules / f"{_AGENT_MODULE}.ko", place)
    where = {"LD_LIBRARY_PATH": f"{unpacked}/usr/lib/x86_64-linux-gnu:{unpacked}/lib/x86_64-linux-gnu"}
    linked = subprocess.run(["ldd", str(program)], env=where, check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"=> (/\S+)", linked):
        shutil.copy(library, place / "lib")
    (loader,) = re.findall(r"^\s*(/\S+)", linked, re.M)
    shutil.copy(loader, place / "loader")
    return _archive(folder / "root", folder / "agent.cpio")


def _archive(root: Path, archive: Path) -> Path:
    names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    # Not compressed: reading 3 MB more costs the emulated CPU less than unpacking them.
    with archive.open("wb") as output:
        argv = ["cpio", "--create", "--quiet", "--format=newc", "--owner=0:0"]
        subprocess.run(argv, cwd=root, input=names.encode(), stdout=output, check=True)
    return archive
