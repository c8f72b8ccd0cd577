"""Calls into libvirt that end in time, with errors of ours.

libvirt's calls block until libvirtd has answered, which it does not while it hangs, or while another job holds the
domain. So each is made by a thread of its own and given up after its time-out; the thread lives until libvirt lets go.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vmsnap.errors import Busy, DriverUnavailable, HypervisorError, UnknownVm, UsageError, VmGone
from vmsnap_drivers.qemu.libvirt import client_log

if TYPE_CHECKING:
    import libvirt

T = TypeVar("T")
INSTALL: Final = 'apt install libvirt-dev pkg-config gcc python3-dev, then: pip install "vmsnap[libvirt]"'
CALL_SECONDS: Final = 30.0
_CERTIFICATES: Final = (
    "see the certificates of both hosts, in /etc/pki or where pkipath=… of the URI says: one authority must have signed"
    " the client's and the server's, that one for the name that the URI has"
)


class Unreachable(HypervisorError):
    """libvirtd does not answer, or hung up. That says nothing of its VMs, which run on without it."""


def binding() -> Any:
    """The module `libvirt`, imported when first needed; it prints nothing of its own from then on.

    :raises DriverUnavailable: it is not installed
    """
    try:
        libvirt = client_log.load()
    except ImportError as e:
        raise DriverUnavailable(f"libvirt's Python binding cannot be loaded: {e}", cure=INSTALL) from e
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt


class _Worker(threading.Thread):
    """Makes one call after the other."""

    def __init__(self) -> None:
        super().__init__(name="vmsnap-libvirt", daemon=True)
        self._work = threading.Semaphore(0)
        self._job: Callable[[], None] = lambda: None

    def give(self, job: Callable[[], None]) -> None:
        """Begin."""
        self._job = job
        self._work.release()

    def run(self) -> None:
        """Work for ever."""
        while True:
            self._work.acquire()
            self._job()
            _idle.append(self)


_idle: list[_Worker] = []


def _free_worker() -> _Worker:
    while True:
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
            worker.start()
        if worker.is_alive():  # after a fork it is not
            return worker


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """Make a call of libvirt's and return its result.

    :param what: what is being done and on what, for messages
    :raises Unreachable: no answer in time, or the connection is broken; what was asked for may still be done
    :raises HypervisorError: libvirt refused, see `translated`
    """
    done = threading.Event()
    results: list[T] = []
    failures: list[BaseException] = []

    def job() -> None:
        try:
            results.append(call())
        except BaseException as e:  # noqa: BLE001 - it is raised where the call was asked for
            failures.append(e)
        finally:
            done.set()

    _free_worker().give(job)
    if not done.wait(seconds):
        raise Unreachable(f"libvirt did not answer within {seconds:g} s: {what}", cure="see whether libvirtd hangs")
    if failures:
        failure = failures[0]
        if isinstance(failure, binding().libvirtError):
            raise translated(failure, what) from failure
        raise failure
    return results[0]


def translated(error: libvirt.libvirtError, what: str) -> Exception:
    """An error of libvirt's as one of ours (``include/libvirt/virterror.h``).

    - `UnknownVm`: no such domain · `VmGone`: it does not run
    - `Busy`: another job holds the domain (libvirtd waits 30 s for it)
    - `UsageError`: a wrong URI, no permission, or certificates that one side does not accept
    - `Unreachable`: no libvirtd, or it hung up
    """
    lib = binding()
    code, message = error.get_error_code(), " ".join(str(error.get_error_message() or error).split())
    text = f"{what}: {message}"
    if re.search("ertificate|TLS", message) and error.get_error_domain() == lib.VIR_FROM_RPC:
        # Of the TLS session; its codes are those of users who are not admitted, and of lost connections.
        reason = client_log.why_certificate_failed()
        return UsageError(f"{text}: {reason}" if reason else text, cure=_CERTIFICATES)
    if code in (lib.VIR_ERR_AUTH_FAILED, lib.VIR_ERR_AUTH_CANCELLED, lib.VIR_ERR_AUTH_UNAVAILABLE):
        return UsageError(text, cure="run vmsnap as a user whom libvirt admits: root, or a member of its group")
    if code == lib.VIR_ERR_ACCESS_DENIED or "Permission denied" in message:
        return UsageError(text, cure="run vmsnap as a user whom libvirt admits: root, or a member of its group")
    if code == lib.VIR_ERR_NO_DOMAIN:
        return UnknownVm(text, cure="see: virsh list --all")
    if code == lib.VIR_ERR_OPERATION_INVALID and ("not running" in message or "no longer running" in message):
        return VmGone(text)
    if code == lib.VIR_ERR_OPERATION_TIMEOUT:
        return Busy(text, cure="let the other job on the domain end, or abort it: virsh domjobabort")
    lost = code in (lib.VIR_ERR_RPC, lib.VIR_ERR_NO_CONNECT, lib.VIR_ERR_INTERNAL_ERROR, lib.VIR_ERR_SYSTEM_ERROR)
    if lost and error.get_error_domain() in (lib.VIR_FROM_RPC, lib.VIR_FROM_REMOTE):
        return Unreachable(text, cure="see whether libvirtd runs, and the URI (-o uri=…)")
    if "URI" in message:
        return UsageError(text, cure="see -o uri=…, such as qemu:///system")
    return HypervisorError(text)
