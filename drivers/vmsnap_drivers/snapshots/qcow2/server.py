"""The NBD server inside QEMU, of which a QEMU has just one.

It listens on a socket that we make and hand over: 0600, in vmsnap's own folder, wherever QEMU's own user may write and
however long the path is. A server of somebody else's is left alone and the snapshot refused: QEMU does not tell where
it listens, so that we could not reach an export of ours in it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

from vmsnap.errors import Busy, HypervisorError, SnapshotError, VmGone
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.qemu.monitor import MonitorError
from vmsnap_drivers.qemu.nbd_handshake import take_leave
from vmsnap_drivers.qemu.nbd_socket import NbdSocket
from vmsnap_drivers.qemu.nbd_wire import NbdError

_ANSWERS_WITHIN_SECONDS: Final = 10.0


def start(graph: BlockGraph, path: Path) -> None:
    """Start the server on the socket `path`, which must not exist.

    :raises Busy: a server runs already
    :raises SnapshotError: the socket cannot be made, or QEMU refused
    """
    name = path.stem
    try:
        listening = _listen(path)
    except OSError as e:
        raise SnapshotError(f"the socket {path} cannot be made: {e.strerror}") from e
    with listening:
        try:
            graph.monitor.send_descriptor(name, listening.fileno())
            graph.monitor.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": name}}})
        except MonitorError as e:
            _take_back(graph, name)
            path.unlink(missing_ok=True)
            if "already running" in e.description:
                raise Busy(
                    "QEMU's only NBD server is in use by another program or by an unfinished backup",
                    cure="stop it there, or run: vmsnap recover",
                ) from e
            raise SnapshotError(e.message) from e
        except VmGone:
            raise
        except HypervisorError as e:
            raise SnapshotError(e.message, cure=e.cure) from e


def stop(graph: BlockGraph, path: Path) -> None:
    """Stop the server if it is the one that listens on `path`, and remove the socket. Idempotent.

    :raises SnapshotError: QEMU refused, or does not answer there
    """
    if path.exists():
        _take_back(graph, path.stem)
    if _is_listening(path):
        graph.call("nbd-server-stop")
    path.unlink(missing_ok=True)


def stop_unseen(graph: BlockGraph) -> None:
    """Stop the server whose socket is gone, with its exports, if one runs. It must be ours.

    :raises SnapshotError: QEMU does not answer
    """
    try:
        graph.call("nbd-server-stop")
    except SnapshotError as e:
        if not isinstance(e.__cause__, MonitorError):  # its only refusal is that none runs
            raise


def _take_back(graph: BlockGraph, name: str) -> None:
    """Let QEMU close a socket that it was given and does not serve: vmsnap died in between, or QEMU refused. Whoever
    connected to it would wait for ever. One that it serves has no name any more (``monitor_get_fd``).

    :raises SnapshotError: QEMU does not answer
    """
    try:
        graph.call("closefd", {"fdname": name})
    except SnapshotError as e:
        if not isinstance(e.__cause__, MonitorError):  # its only refusal is that there is none of that name
            raise


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The address of a UNIX socket has room for 107 bytes; a path through its folder's descriptor is short.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(f"/proc/self/fd/{folder}/{path.name}")
        # Nobody can connect before it listens, and it does so with its final mode.
        path.chmod(0o600)
        listening.listen()
    except OSError:
        listening.close()
        raise
    finally:
        os.close(folder)
    return listening


def _is_listening(path: Path) -> bool:
    """Say whether somebody listens there. It can only be QEMU, to which the socket was given.

    Takes its leave of the server instead of hanging up: QEMU 7.2 with Debian's fix of CVE-2024-7409 stands still for
    ever in an ``nbd-server-stop`` that comes while a client still negotiates (``nbd_server_free`` waits for it, and
    serves it no more). By the time that this client's goodbye is answered, clients that died before it are gone too.

    :raises NbdError: it listens and does not answer
    """
    if not path.exists():
        return False
    try:
        connection = NbdSocket(path, _ANSWERS_WITHIN_SECONDS)
    except NbdError as e:
        if isinstance(e.__cause__, ConnectionRefusedError):
            return False
        raise
    take_leave(connection)
    return True
