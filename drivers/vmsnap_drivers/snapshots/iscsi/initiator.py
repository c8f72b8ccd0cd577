"""Reads a LUN through QEMU's own initiator: qemu-nbd connects to the target, and is read over a UNIX socket.

No kernel part, no root. CHAP's secret is a file that qemu-nbd reads itself: it stands in no command line.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import DriverUnavailable, SnapshotError
from vmsnap.model import Extent
from vmsnap.roles import DiskReader
from vmsnap_drivers.qemu.nbd import NbdClient, NbdError
from vmsnap_drivers.qemu.nbd_wire import STATE_ZERO
from vmsnap_drivers.snapshots.iscsi.address import LunAddress

_START_SECONDS: Final = 60.0
_END_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 30.0
_COMMAND_SECONDS: Final = 15
_LOOK_EACH_SECONDS: Final = 0.01
_STEP_BYTES: Final = 1 << 30
PACKAGES: Final = "qemu-utils qemu-block-extra"
INSTALL: Final = f"on Debian: apt install {PACKAGES}"
_NO_MODULE: Final = "Unknown driver 'iscsi'"
"""What QEMU's programs say (``bdrv_fill_options`` in ``block.c``, 7.2 and 10.0) where its module block-iscsi, a package
of its own, is not installed. Their lists of formats name it all the same.
"""


def check_tools() -> None:
    """See that LUNs can be reached by QEMU's initiator. Asks no target; takes a moment.

    :raises DriverUnavailable: qemu-nbd, or QEMU's module for iSCSI, is not installed
    """
    program = shutil.which("qemu-nbd")
    if program is None:
        raise DriverUnavailable("reading over iSCSI needs qemu-nbd, which is not installed", cure=INSTALL)
    # It ends at once: which LUN is to be opened is not said.
    done = subprocess.run(
        [program, "--read-only", "--image-opts", "driver=iscsi"], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=_ANSWER_SECONDS, check=False,
    )  # fmt: skip
    check_module(done.stderr.decode(errors="replace"))


def check_module(said: str) -> None:
    """See that it was not for want of QEMU's module that one of its tools has failed, which `said` why.

    :raises DriverUnavailable: it was
    """
    if _NO_MODULE in said:
        raise DriverUnavailable("QEMU's module for iSCSI, block-iscsi, is not installed", cure=INSTALL)


@dataclass(frozen=True)
class Account:
    """Who we are to a target with CHAP. `password_file` holds the secret and nothing else; empty: no CHAP."""

    user: str = ""
    password_file: str = ""

    def arguments(self) -> list[str]:
        """What makes the secret known to one of QEMU's tools."""
        if not self.user:
            return []
        return ["--object", f"secret,id=chap,file={self.password_file.replace(',', ',,')}"]

    def image_options(self, lun: LunAddress, *options: str) -> str:
        """How QEMU's tools are told a LUN, which they reach by this account."""
        user = [f"file.user={self.user.replace(',', ',,')}", "file.password-secret=chap"] if self.user else []
        where = [f"file.portal={lun.portal}", f"file.target={lun.target}", f"file.lun={lun.lun}"]
        return ",".join(
            ["driver=raw", *options, "file.driver=iscsi", "file.transport=tcp", *where,
             f"file.timeout={_COMMAND_SECONDS}", *user]
        )  # fmt: skip


class InitiatorReader(DiskReader):
    """Reads one LUN. Used by one thread at a time."""

    def __init__(
        self, lun: LunAddress, size_bytes: int, label: str, account: Account, given_up: Callable[[], str] = str
    ) -> None:
        """Connect. Blocks.

        :param label: what messages call it
        :param given_up: tells why it was taken from us, or is to be, once nobody is connected; empty otherwise
        :raises SnapshotError: the target cannot be reached, does not let us in, or the LUN has another size
        :raises DriverUnavailable: qemu-nbd, or QEMU's module for iSCSI, is not installed
        """
        if why := given_up():
            raise SnapshotError(f"{label} is lost: {why}")
        self.size_bytes = size_bytes
        self._label = label
        self._given_up = given_up
        self._client: NbdClient | None = None
        self._process: subprocess.Popen[bytes] | None = None
        program = shutil.which("qemu-nbd")
        if program is None:
            raise DriverUnavailable("reading over iSCSI needs qemu-nbd, which is not installed", cure=INSTALL)
        image = account.image_options(lun, "read-only=on", "file.read-only=on")
        try:
            # It listens in a folder that nobody else may enter, and ends with its one client, whoever kills that.
            with tempfile.TemporaryDirectory(prefix="vmsnap-iscsi-") as folder:
                self._client = self._start(
                    [program, "--read-only", *account.arguments(), "--image-opts", image], Path(folder)
                )
            if self._client.size_bytes != size_bytes:
                raise SnapshotError(f"{label} is lost: it has {self._client.size_bytes} bytes, its disk {size_bytes}")
        except BaseException:
            self.close()
            raise

    def extents(self) -> Iterator[Extent]:
        """See `DiskReader.extents`; zeros where the target tells them."""
        pending: Extent | None = None
        for offset in range(0, self.size_bytes, _STEP_BYTES):
            try:
                found = list(self._nbd().ranges(offset=offset, length=min(_STEP_BYTES, self.size_bytes - offset)))
            except NbdError as e:
                raise self._lost(e) from e
            for each in found:
                zero = bool(each.flags & STATE_ZERO)
                if pending is not None and pending.zero == zero:
                    pending = Extent(pending.offset, pending.length + each.length, zero)
                    continue
                if pending is not None:
                    yield pending
                pending = Extent(each.offset, each.length, zero)
        if pending is not None:
            yield pending

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `DiskReader.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise SnapshotError(f"{self._label}: {offset}+{len(buffer)} leaves the disk of {self.size_bytes} bytes")
        try:
            self._nbd().read_into(offset, buffer)
        except NbdError as e:
            raise self._lost(e) from e

    def close(self) -> None:
        """See `DiskReader.close`. qemu-nbd is ended: it may wait for a target that is gone."""
        if self._client is not None:
            self._client.close()
        if self._process is not None:
            try:
                self._process.wait(0.5 if self._client is not None else 0.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_END_SECONDS)
            self._process = None

    def _start(self, argv: list[str], folder: Path) -> NbdClient:
        listening = folder / "socket"
        with (folder / "messages").open("w+b") as messages:
            process = self._process = subprocess.Popen(
                [*argv[:1], f"--socket={listening}", *argv[1:]], stdin=subprocess.DEVNULL,
                stdout=messages, stderr=messages, start_new_session=True,
            )  # fmt: skip
            deadline = time.monotonic() + _START_SECONDS
            while True:
                if process.poll() is not None:
                    messages.seek(0)
                    said = " ".join(messages.read().decode(errors="replace").split())
                    check_module(said)
                    raise SnapshotError(f"{self._label} cannot be reached: {said.removeprefix('qemu-nbd: ')}")
                if listening.exists():
                    try:
                        return NbdClient(listening, "", timeout_seconds=_ANSWER_SECONDS)
                    except NbdError as e:
                        # It listens before it has opened the LUN, and hangs up where it cannot.
                        if time.monotonic() > deadline:
                            raise self._lost(e) from e
                if time.monotonic() > deadline:
                    raise SnapshotError(f"{self._label} cannot be reached: the target does not answer")
                time.sleep(_LOOK_EACH_SECONDS)

    def _nbd(self) -> NbdClient:
        if self._client is None or self._process is None:
            raise SnapshotError(f"{self._label} is closed")
        if why := self._given_up():
            raise SnapshotError(f"{self._label} is lost: {why}")
        return self._client

    def _lost(self, error: NbdError) -> SnapshotError:
        if why := self._given_up():
            return SnapshotError(f"{self._label} is lost: {why}")
        return SnapshotError(f"{self._label} cannot be read over iSCSI: {error.message}")
