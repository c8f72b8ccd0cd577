"""The QEMU builds that the lab can start: Debian's 7.2, and 10.0 unpacked beside it."""

import functools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CACHE_VARIABLE = "VMSNAP_LAB_CACHE"


def cache_folder() -> Path:
    """The folder that install.sh filled, and where the lab keeps what it builds."""
    return Path(os.environ.get(CACHE_VARIABLE, "/var/cache/vmsnap-lab"))


def unpacked(name: str, what: str) -> Path:
    """The folder below it into which install.sh has unpacked `what`.

    :raise LookupError: when install.sh has not been run.
    """
    folder = cache_folder() / name
    if not (folder / "complete").exists():
        raise LookupError(f"no {what} in the cache: run tests/lab/install.sh as root")
    return folder


@dataclass(frozen=True)
class QemuBuild:
    """One QEMU. Its arguments and environment are all that a second process needs to be the same.

    A running one shows them in ``/proc/PID/cmdline`` and ``/proc/PID/environ``.
    """

    version: str
    """Major and minor number, such as ``7.2``."""
    binary: Path
    """The real ``qemu-system-x86_64``, not a wrapper script: what ``/proc/PID/exe`` points to."""
    img_binary: Path
    """A ``qemu-img`` of this version that runs as it is."""
    wrapper: Path
    """Runs ``binary`` with its prefix arguments and environment; the binary itself where it needs none."""
    prefix_arguments: tuple[str, ...] = ()
    """Arguments that must come before all others."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to add to the environment."""
    loses_dirty_pages: bool = False
    """Whether, under emulation, pre-copy migration can miss pages that the guest wrote.

    It happens where QEMU clears its dirty bitmap in whole words and leaves the emulated CPU's TLB
    as it was. RAM whose size is no multiple of 256 KiB takes the other, correct way.
    """

    def command(self, *arguments: str) -> list[str]:
        """The argv that starts this QEMU with `arguments`."""
        return [str(self.binary), *self.prefix_arguments, *arguments]

    def start_environment(self) -> dict[str, str]:
        """This process's environment with the variables that the build needs."""
        return {**os.environ, **self.environment}

    def create_image(self, path: Path, image_format: str, size_bytes: int) -> None:
        """Create an empty disk image.

        :raise subprocess.CalledProcessError: when qemu-img fails.
        """
        argv = [str(self.img_binary), "create", "-q", "-f", image_format, str(path), str(size_bytes)]
        subprocess.run(argv, check=True, capture_output=True)


def _installed_build() -> QemuBuild:
    binary = Path("/usr/bin/qemu-system-x86_64")
    return QemuBuild("7.2", binary, img_binary=Path("/usr/bin/qemu-img"), wrapper=binary, loses_dirty_pages=True)


def _unpacked_build() -> QemuBuild:
    folder = cache_folder() / "qemu-10.0"
    usr = folder / "root/usr"
    libraries = usr / "lib/x86_64-linux-gnu"
    return QemuBuild(
        version="10.0",
        binary=usr / "bin/qemu-system-x86_64",
        img_binary=folder / "qemu-img-10.0",
        wrapper=folder / "qemu-system-x86_64-10.0",
        prefix_arguments=("-L", str(usr / "share/qemu"), "-L", str(usr / "share/seabios")),
        environment={"LD_LIBRARY_PATH": str(libraries), "QEMU_MODULE_DIR": str(libraries / "qemu")},
    )


def _reports_its_version(build: QemuBuild) -> bool:
    try:
        argv = build.command("-version")
        answer = subprocess.run(argv, env=build.start_environment(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    found = re.search(r"version (\d+\.\d+)", answer.stdout)
    return found is not None and found[1] == build.version and build.img_binary.exists()


@functools.cache
def available_qemus() -> tuple[QemuBuild, ...]:
    """The builds that start on this machine, oldest first."""
    return tuple(build for build in (_installed_build(), _unpacked_build()) if _reports_its_version(build))


def find_qemu(version: str) -> QemuBuild:
    """The build of that version.

    :raise LookupError: when it is not on this machine; the message says how to get it.
    """
    for build in available_qemus():
        if build.version == version:
            return build
    raise LookupError(f"QEMU {version} is not here: run tests/lab/install.sh as root")
