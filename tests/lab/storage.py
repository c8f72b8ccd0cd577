"""A guest for what this host's kernel cannot do: device mapper, and whatever else Debian's kernel has as modules.

Its root is the host's own, read-only, with the packages of install.sh laid over it and RAM over both: programs, the
checkout and its virtual environment are there as they are here, and nothing that it does reaches the host but through
the folder of results. It has no udev.
"""

import hashlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .machine import LabError
from .qemus import cache_folder, find_qemu, unpacked

_BUSYBOX = Path("/bin/busybox")
_INIT = Path(__file__).parent / "storage_guest/init"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent
_NEEDED = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
_MEMORY_MIB = 1024
# What costs an emulated CPU much and gives a guest of some minutes nothing: copying byte by byte (erms), page tables of
# five levels, the kernel's guards against itself and others, huge pages. Without them programs take 8 % less.
_CPU = "max,-erms,-la57,-smap,-smep,-umip,-pku"
_QUICK = "mitigations=off transparent_hugepage=never"
_BOOT_SECONDS = 180.0
_POLL_SECONDS = 0.05
ADDRESS = "10.0.2.15"
"""The guest's on its network, and `HOST_ADDRESS` that from which whatever comes through a forward comes."""
HOST_ADDRESS = "10.0.2.2"


@dataclass(frozen=True)
class Ended:
    """How a script in the guest ended, and what it printed."""

    status: int
    output: str


class StorageGuest:
    """One such guest. Use with ``with``; ``results`` is the folder that both sides see, ``/run/results`` in there."""

    def __init__(self, folder: Path, forwards: Mapping[int, int] | None = None, layer: Path | None = None) -> None:
        """Describe it; nothing is started.

        :param layer: a folder to be laid over the packages of install.sh
        :param forwards: for ports of the host's loopback, the guest's ports to which they lead. Without any it has no
            network; with, it has `ADDRESS` on its first interface, which a script must set, and reaches nobody.
        """
        self.folder = folder
        self.forwards = dict(forwards or {})
        self.layer = layer
        self.results = folder / "results"
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._heard = b""

    def start(self) -> None:
        """Boot it and wait until it takes scripts; some seconds.

        :raise LabError: it does not come up.
        :raise LookupError: install.sh has not been run.
        """
        self.results.mkdir(parents=True)
        kernel, initramfs = _boot_files()
        listener = socket.socket(socket.AF_UNIX)
        with listener, (self.folder / "qemu.log").open("wb") as log:
            listener.bind(str(self.folder / "port"))
            listener.listen(1)
            listener.settimeout(_BOOT_SECONDS)
            self._process = subprocess.Popen(
                self._command(kernel, initramfs), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            try:
                self._port, _ = listener.accept()
                self._listen(_BOOT_SECONDS, "ready")
            except (OSError, LabError) as e:
                self.kill()
                raise LabError(f"the storage guest does not come up: {e}: {self.last_words()}") from e

    def _command(self, kernel: Path, initramfs: Path) -> list[str]:
        qemu, shared = find_qemu("7.2"), "local,security_model=none,multidevs=remap"
        # fmt: off
        return qemu.command(
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "pc,accel=tcg", "-cpu", _CPU, "-m", f"{_MEMORY_MIB}", "-smp", "1",
            "-kernel", str(kernel), "-initrd", str(initramfs),
            # The kernel hands what it does not know on to init, as a variable.
            "-append", f"console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check {_QUICK}"
            f" CHECKOUT={_CHECKOUT} LAYER={'layer' if self.layer else ''}",
            "-serial", f"file:{self.folder / 'serial.log'}",
            "-chardev", f"socket,id=port,path={self.folder / 'port'}", "-serial", "chardev:port",
            "-virtfs", f"{shared},path=/,mount_tag=host,readonly=on",
            "-virtfs", f"{shared},path={cache_folder() / 'storage/root'},mount_tag=packages,readonly=on",
            "-virtfs", f"{shared},path={_CHECKOUT},mount_tag=checkout,readonly=on",
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

    def begin(self, name: str, script: str) -> None:
        """Let a shell in the guest begin with `script`; `name` is that of its file. One at a time."""
        (self.results / name).write_text(script)
        self._send(name)

    def end(self, name: str, seconds: float) -> Ended:
        """Wait for the script's end.

        :raise LabError: it does not end in time, or the guest is gone.
        """
        answer = self._listen(seconds, name)
        return Ended(int(answer.split()[1]), self.output(name))

    def run(self, name: str, script: str, seconds: float = 120.0) -> Ended:
        """Run `script` in the guest to its end."""
        self.begin(name, script)
        return self.end(name, seconds)

    def output(self, name: str) -> str:
        """What the script has printed so far."""
        path = self.results / f"{name}.output"
        return path.read_text(errors="replace") if path.exists() else ""

    def ended(self, name: str) -> bool:
        """Whether the script has ended, or the guest has; then `end` does not wait."""
        if self._process is None or self._process.poll() is not None:
            return True
        self._hear(0.0)
        return any(line.split()[:1] == [name.encode()] for line in self._heard.split(b"\n")[:-1])

    def kill(self) -> None:
        """End the guest now. Killing twice is fine."""
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def last_words(self) -> str:
        """The end of what QEMU and the guest's console said."""
        texts = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
        return " | ".join(texts)

    def __enter__(self) -> "StorageGuest":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _send(self, line: str) -> None:
        if self._port is None:
            raise LabError("the storage guest was not started")
        self._port.sendall(line.encode() + b"\n")

    def _listen(self, seconds: float, word: str) -> str:
        """The next line, which begins with `word`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._heard:
            if self._process is None or self._process.poll() is not None:
                raise LabError(f"the storage guest has ended: {self.last_words()}")
            if time.monotonic() > deadline:
                raise LabError(f"the storage guest does not say {word!r} within {seconds:g} s: {self.last_words()}")
            self._hear(_POLL_SECONDS)
        line, _, self._heard = self._heard.partition(b"\n")
        text = line.decode(errors="replace").strip()
        if text.split()[:1] != [word]:
            raise LabError(f"the storage guest says {text!r} instead of {word!r}")
        return text

    def _hear(self, seconds: float) -> None:
        if self._port is None:
            raise LabError("the storage guest was not started")
        self._port.settimeout(seconds or 1e-6)
        try:
            self._heard += self._port.recv(4096)
        except TimeoutError:
            return


def _boot_files() -> tuple[Path, Path]:
    """Kernel and initramfs; the latter is built at the first call and whenever something that it is made of changed."""
    packages = unpacked("storage", "kernel with device mapper")
    kernel = sorted((packages / "root/boot").glob("vmlinuz-*"))[-1]
    modules = packages / "root/usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
    made_of = kernel.name.encode() + repr(_NEEDED).encode() + _BUSYBOX.read_bytes() + _INIT.read_bytes()
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
    shutil.copy(_INIT, root / "init")
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
