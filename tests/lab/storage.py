"""The storage guest as a machine of its own, emulated: Debian's kernel with all of its modules, and a network."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .qemus import cache_folder, find_qemu, unpacked
from .scripted_guest import CHECKOUT, INIT, MEMORY_MIB, ScriptedGuest

_BUSYBOX = Path("/bin/busybox")
_INIT = (INIT / "init", INIT / "serve")
_NEEDED = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
# What costs an emulated CPU much and gives a guest of some minutes nothing: copying byte by byte (erms), page tables of
# five levels, the kernel's guards against itself and others, huge pages. Without them programs take 8 % less.
_CPU = "max,-erms,-la57,-smap,-smep,-umip,-pku"
_QUICK = "mitigations=off transparent_hugepage=never"
ADDRESS = "10.0.2.15"
"""The guest's on its network, and `HOST_ADDRESS` that from which whatever comes through a forward comes."""
HOST_ADDRESS = "10.0.2.2"


class StorageGuest(ScriptedGuest):
    """One such guest."""

    def __init__(self, folder: Path, forwards: Mapping[int, int] | None = None, layer: Path | None = None) -> None:
        """Describe it; nothing is started.

        :param layer: a folder to be laid over the packages of install.sh
        :param forwards: for ports of the host's loopback, the guest's ports to which they lead. Without any it has no
            network; with, it has `ADDRESS` on its first interface, which a script must set, and reaches nobody.
        """
        super().__init__(folder)
        self.forwards = dict(forwards or {})
        self.layer = layer

    def _command(self, port: int) -> list[str]:
        (kernel, initramfs), qemu = _boot_files(), find_qemu("7.2")
        shared = "local,security_model=none,multidevs=remap"
        # fmt: off
        return qemu.command(
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "pc,accel=tcg", "-cpu", _CPU, "-m", f"{MEMORY_MIB}", "-smp", "1",
            "-kernel", str(kernel), "-initrd", str(initramfs),
            # The kernel hands what it does not know on to init, as a variable.
            "-append", f"console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check {_QUICK}"
            f" CHECKOUT={CHECKOUT} LAYER={'layer' if self.layer else ''}",
            "-serial", f"file:{self.folder / 'serial.log'}",
            "-chardev", f"socket,id=port,fd={port}", "-serial", "chardev:port",
            "-virtfs", f"{shared},path=/,mount_tag=host,readonly=on",
            "-virtfs", f"{shared},path={cache_folder() / 'storage/root'},mount_tag=packages,readonly=on",
            "-virtfs", f"{shared},path={CHECKOUT},mount_tag=checkout,readonly=on",
            "-virtfs", f"{shared},path={self.results},mount_tag=results",
            *(["-virtfs", f"{shared},path={self.layer},mount_tag=layer,readonly=on"] if self.layer else []),
            *self._network(),
        )
        # fmt: on

    def _network(self) -> list[str]:
        if not self.forwards:
            return []
        forwards = [f"hostfwd=tcp:127.0.0.1:{port}-{ADDRESS}:{inner}" for port, inner in self.forwards.items()]
        network = ",".join(["user", "id=net0", "restrict=on", *forwards])
        return ["-netdev", network, "-device", "virtio-net-pci,netdev=net0,romfile="]


def _boot_files() -> tuple[Path, Path]:
    """Kernel and initramfs; the latter is built at the first call and whenever something that it is made of changed."""
    packages = unpacked("storage", "kernel with device mapper")
    kernel = sorted((packages / "root/boot").glob("vmlinuz-*"))[-1]
    modules = packages / "root/usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
    made_of = kernel.name.encode() + repr(_NEEDED).encode() + b"".join(path.read_bytes() for path in (_BUSYBOX, *_INIT))
    initramfs = cache_folder() / f"storage-{hashlib.sha256(made_of).hexdigest()[:16]}.cpio"
    if not initramfs.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="build-") as folder:
            _build(Path(folder), modules).replace(initramfs)
    return kernel, initramfs


def _build(folder: Path, modules: Path) -> Path:
    root = folder / "root"
    for name in ("bin", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin/busybox")
    for path in _INIT:
        shutil.copy(path, root)
    (root / "init").chmod(0o755)
    order = _in_order(modules)
    for module in order:
        shutil.copy(modules / module, root / "modules")
    (root / "modules/order").write_text("".join(f"{Path(module).name}\n" for module in order))
    names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    archive = folder / "initramfs.cpio"
    with archive.open("wb") as output:
        argv = ["cpio", "--create", "--quiet", "--format=newc", "--owner=0:0"]
        subprocess.run(argv, cwd=root, input=names.encode(), stdout=output, check=True)
    return archive


def _in_order(modules: Path) -> list[str]:
    """The modules that are needed, each after those that it needs itself, as ``modules.dep`` has it."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[module] = others.split()
    order: list[str] = []

    def add(module: str) -> None:
        for other in needs[module]:
            add(other)
        if module not in order:
            order.append(module)

    for name in _NEEDED:
        add(next(module for module in needs if Path(module).stem == name))
    return order
