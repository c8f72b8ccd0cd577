"""Successive RAM images of a guest that works: on files, on its memory and on its disks.

The lab's guest (tests/lab) boots with real files of this system beside its own program, and packs, sorts and counts
them again and again while that program writes to RAM and disks. vmsnap captures its RAM, running, every few seconds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.system_files import copy_files
from tests.lab import LabMachine, QemuBuild, available_qemus
from tests.lab.initramfs import guest_image
from tests.lab.machine import LabError
from vmsnap.controller import Controller
from vmsnap.host import HostFolders
from vmsnap.places import create_repository

MIB = 1 << 20

_INIT = """#!/bin/busybox sh
/bin/busybox mknod /dev/null c 1 3
/bin/busybox sh /work.sh </dev/null >/work.log 2>&1 &
exec /init
"""
_WORK = """
while ! [ -e /bin/sort ]; do /bin/busybox sleep 1; done
mkdir /results
files() { find "$folder" -type f | head -n "$1"; }
round=0
while true; do
    for folder in /files/*; do
        round=$((round + 1))
        kept=/results/$((round % 6))
        case $((round % 3)) in
            0) tar -c "$folder" | head -c 8000000 | gzip -1 >$kept.tgz ;;
            1) files 300 | xargs cat | head -c 500000 | tr -cs '[:alnum:]' '\\n' | sort >$kept.text ;;
            2) files 200 | xargs md5sum >$kept.sums ;;
        esac
        echo "WORK $round" >/dev/console
    done
done
"""
_TOUCHED_MIB_PART = 5
"""A fifth of the RAM holds random numbers that never change, as a cache of packed files would."""
_FILES_PART = 4
"""A quarter of the RAM holds real files."""
_WARM_COUNT = 300
_WARM_ROUNDS = 6
_POLL_SECONDS = 0.2


class WorkingMachine(LabMachine):
    """A lab guest with files to work on."""

    def __init__(self, folder: Path, qemu: QemuBuild, memory_mib: int) -> None:
        """Describe it; nothing is started. Needs as much room in `folder` as its files take."""
        self._initramfs = folder / "initramfs.cpio"
        settings = {"touch_mib": memory_mib // _TOUCHED_MIB_PART}
        super().__init__(folder, qemu, memory_mib=memory_mib, settings=settings)

    def __enter__(self) -> WorkingMachine:
        self.start()
        return self

    def command(self) -> list[str]:
        """The argv of the lab, with the files in a second archive behind the first."""
        self._build()
        argv = super().command()
        argv[argv.index("-initrd") + 1] = str(self._initramfs)
        argv[argv.index("-append") + 1] += " rdinit=/begin"
        return argv

    def rounds(self) -> int:
        """How many pieces of work the guest has done on its files."""
        return len(re.findall(r"^WORK \d+", self.serial_text(), re.MULTILINE))

    def wait_for_round(self, at_least: int, timeout_seconds: float) -> None:
        """Wait until it has done so many.

        :raises LabError: it faults, ends, or does not get there in time
        """
        deadline = time.monotonic() + timeout_seconds
        while self.rounds() < at_least:
            if self.ended() or self.faults() or time.monotonic() > deadline:
                raise LabError(f"the guest did {self.rounds()} rounds: {self.serial_text()[-500:]!r}")
            time.sleep(_POLL_SECONDS)

    def _build(self) -> None:
        root = self.folder / "root"
        copy_files(root / "files", self.memory_mib * MIB // _FILES_PART)
        for name, text in (("begin", _INIT), ("work.sh", _WORK)):
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
        with self._initramfs.open("wb") as output:
            output.write(guest_image().initramfs.read_bytes())
            output.flush()
            argv = ["cpio", "--create", "--quiet", "--format=newc", "--owner=0:0"]
            subprocess.run(argv, cwd=root, input=names.encode(), stdout=output, check=True)
        shutil.rmtree(root)


def capture_images(
    folder: Path, *, memory_mib: int, count: int, apart_seconds: float, tell: Callable[[str], None]
) -> Sequence[Path]:
    """Boot a guest and write `count` images of its RAM, that many seconds apart, as sparse files into `folder`. Blocks.

    :raises VmsnapError: a backup failed
    :raises LabError: the guest failed
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vmsnap-ram-") as place:
        folders = HostFolders.find(Path(place, "state"))
        repository = create_repository(str(Path(place, "repository")))
        try:
            with (
                WorkingMachine(Path(place, "vm"), available_qemus()[-1], memory_mib) as machine,
                Controller(folders) as controller,
            ):
                machine.wait_for_count(_WARM_COUNT, timeout_seconds=300)
                machine.wait_for_round(_WARM_ROUNDS, timeout_seconds=300)
                controller.add_vm("vm001", "qemu", {"qmp": str(machine.qmp_socket)})
                backups = []
                due = time.monotonic() + apart_seconds
                for number in range(count):
                    time.sleep(max(0.0, due - time.monotonic()))
                    due = time.monotonic() + apart_seconds
                    backups.append(controller.backup("vm001", repository).backup)
                    tell(f"RAM image {number + 1} of {count}: the guest has done {machine.rounds()} rounds of work")
        finally:
            shutil.rmtree(folders.memory_dir, ignore_errors=True)
        paths = []
        for number, backup in enumerate(backups, 1):
            memory = max(repository.manifest(backup).memory, key=lambda each: each.image.size_bytes)
            path = folder / f"ram{number}.img"
            path.unlink(missing_ok=True)
            repository.reader(memory.image).restore_to_file(path)
            paths.append(path)
        return paths
