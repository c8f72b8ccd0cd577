"""The emulated TPM of a VM: a process swtpm beside each QEMU, whose state QEMU's migration carries.

QEMU asks swtpm for its state when it saves the devices, within the pause, and gives it to the new VM's swtpm when it
loads them (``backends/tpm/tpm_emulator.c``, ``vmstate_tpm_emulator``, QEMU 7.2 and 10.0): so the TPM is of the same
instant.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmsnap.errors import DriverUnavailable, HypervisorError
from vmsnap_drivers.qemu.commandline import Argument
from vmsnap_drivers.qemu.rewrite import TPM_SOCKET_NAME

_STATE_NAME: Final = "tpm"
_LOG_NAME: Final = "swtpm.log"
_START_SECONDS: Final = 10.0
_END_SECONDS: Final = 10.0
_LOOK_EACH_SECONDS: Final = 0.005


def has_emulator(arguments: Sequence[Argument]) -> bool:
    """Whether the VM has a TPM that swtpm emulates."""
    return any(a.name == "tpmdev" and a.properties.get("type") == "emulator" for a in arguments)


def version_of(arguments: Sequence[Argument]) -> str:
    """The version of the TPM that the running swtpm emulates, by its command line: ``2.0``, or ``1.2`` where swtpm was
    not told otherwise. A swtpm that is not seen is taken for the usual 2.0. Empty where there is no emulated TPM.
    """
    if not has_emulator(arguments):
        return ""
    chardevs = {a.properties.get("chardev") for a in arguments if a.name == "tpmdev"}
    paths = [a.properties.get("path") for a in arguments if a.name == "chardev" and a.properties.get("id") in chardevs]
    for words in _running().values():
        if any(path and path in word for path in paths for word in words):
            return "2.0" if "--tpm2" in words else "1.2"
    return "2.0"


def start(version: str, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a swtpm for the VM of this run folder, its state in there, too. It ends by itself with its QEMU.

    :raises DriverUnavailable: swtpm is not installed
    :raises HypervisorError: it does not come up
    """
    state, socket = folder / _STATE_NAME, folder / TPM_SOCKET_NAME
    state.mkdir(mode=0o700)
    # fmt: off
    argv = [
        "swtpm", "socket", "--tpmstate", f"dir={state},mode=0600", "--ctrl", f"type=unixio,path={socket},mode=0600",
        "--log", f"file={folder / _LOG_NAME},level=1", "--terminate",
    ]
    # fmt: on
    if version == "2.0":
        argv.append("--tpm2")
    try:
        process = subprocess.Popen(
            argv,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except FileNotFoundError as e:
        raise DriverUnavailable("the VM has a TPM, and swtpm is not installed", cure="apt install swtpm") from e
    deadline = time.monotonic() + _START_SECONDS
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise HypervisorError(f"swtpm did not come up: {_last_words(folder)}")
        time.sleep(_LOOK_EACH_SECONDS)
    return process


def end(folder: Path) -> None:
    """End the swtpm of a run folder, which outlives only a load that was broken off: it ends with its QEMU else.
    Idempotent.

    :raises HypervisorError: it does not end
    """
    if not (folder / _STATE_NAME).exists():
        return
    wanted = f"dir={folder / _STATE_NAME},mode=0600"
    deadline = time.monotonic() + _END_SECONDS
    while found := [pid for pid, words in _running().items() if wanted in words]:
        if time.monotonic() > deadline:
            raise HypervisorError(f"swtpm, process {found[0]}, does not end")
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(_LOOK_EACH_SECONDS)


def _running() -> dict[int, list[str]]:
    """The words of the command line of each swtpm."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].rpartition("/")[2] == "swtpm":
            found[int(process.name)] = words
    return found


def _last_words(folder: Path) -> str:
    log = folder / _LOG_NAME
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"
