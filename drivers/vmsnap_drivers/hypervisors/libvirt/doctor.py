"""Whether domains of a libvirt can be captured and brought back, and what of this host stands in the way."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Final

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_drivers.hypervisors.libvirt.domain import Domains, reached
from vmsnap_drivers.hypervisors.libvirt.reach import qemu_user
from vmsnap_drivers.hypervisors.libvirt.remote import is_remote
from vmsnap_drivers.qemu import write_protection

_CONFINED: Final = {
    "apparmor": "let QEMU open the files that vmsnap makes beside disks: a line such as '/srv/vms/** rwk,' in"
    " /etc/apparmor.d/local/abstractions/libvirt-qemu",
    "selinux": "let QEMU open the files that vmsnap makes beside disks: label their folder svirt_image_t, or give the"
    " domain <seclabel type='none' model='selinux'/>",
}
_LET_USE_USERFAULTFD: Final = (
    "sysctl vm.unprivileged_userfaultfd=1; or, for QEMU 8.0 and later, give its user /dev/userfaultfd, and name that in"
    " cgroup_device_acl of /etc/libvirt/qemu.conf, as libvirt's QEMU has a /dev of its own; else pre-copy is used"
)
_SANDBOX: Final = (
    "libvirt starts QEMU with -sandbox on, which lets it use userfaultfd and open files (tried with QEMU 7.2); where a"
    " capture is refused all the same, set seccomp_sandbox = 0 in /etc/libvirt/qemu.conf and start the domain anew"
)
_FILES_OVER_MONITOR: Final = 8_002_000
"""libvirt's version from which descriptors go through the passthrough (``virDomainQemuMonitorCommandWithFiles``)."""


def look_at_libvirt(uri: str) -> Iterator[Finding]:
    """libvirt itself: reached, new enough, whom its QEMUs run as, what confines them. Never raises."""
    try:
        with reached(uri) as domains:
            yield from _look(domains)
    except VmsnapError as e:
        yield Finding("libvirt", "missing", e.message, e.cure)


def look_at_agent(vm: str, check: Callable[[], None]) -> Finding:
    """Whether its guest agent can be asked to freeze it. Never raises."""
    try:
        check()
    except VmsnapError as e:
        return Finding(f"VM {vm}: fsfreeze", "missing", e.message, e.cure)
    return Finding(f"VM {vm}: fsfreeze", "ok", "its guest agent answers")


def tell_frozen(vm: str, domain: str) -> Finding:
    """That nobody has thawed it yet."""
    return Finding(
        f"VM {vm}: fsfreeze",
        "missing",
        "its file systems may be frozen: it was captured so and not let run by vmsnap, or a backup was broken off",
        f"when it runs: virsh domfsthaw {domain}; after a backup: vmsnap recover {vm}",
    )


def _look(domains: Domains) -> Iterator[Finding]:
    domains.check_kind()
    if is_remote(domains.uri):
        message = (
            "captures need a libvirt of this host: a remote one passes QEMU no descriptors, and its disks lie there"
        )
        yield Finding("libvirt's URI", "missing", message, "run vmsnap on that host with -o uri=qemu:///system")
    version = domains.call("its version", lambda connection: int(connection.getLibVersion()))
    text = f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000} at {domains.uri}"
    if version < _FILES_OVER_MONITOR:
        yield Finding("libvirt", "missing", f"{text} passes no descriptors to QEMU", "libvirt 8.2 or later is needed")
    else:
        yield Finding("libvirt", "ok", text)
    yield Finding(
        "libvirt's monitor passthrough",
        "note",
        "captures go through it; libvirt calls it unsupported and marks the domain as tainted (custom-monitor)",
    )
    yield Finding("QEMU's sandbox", "note", _SANDBOX)
    capabilities = domains.call("its capabilities", lambda connection: str(connection.getCapabilities()))
    user = qemu_user(capabilities)
    if user is not None:
        if why_not := write_protection.why_not_for(user):
            yield Finding("userfaultfd for libvirt's QEMU", "note", why_not, _LET_USE_USERFAULTFD)
        else:
            yield Finding("userfaultfd for libvirt's QEMU", "ok", f"user {user} may use it")
    for model in ET.fromstring(capabilities).iterfind("host/secmodel"):
        name = model.findtext("model", "")
        if name in _CONFINED:
            yield Finding(
                f"{name} confines QEMU", "note", "QEMU may be refused files of the mechanism qcow2", _CONFINED[name]
            )
