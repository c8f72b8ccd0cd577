"""What a domain is made of, so that a capture notices when somebody changes it: devices that come or go, media that are
changed, and a definition that libvirt forgets.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.errors import HypervisorError, UnknownVm, VmGone
from vmsnap_drivers.hypervisors.libvirt.domain import Domain, Domains, address_of


@dataclass(frozen=True)
class Shape:
    """A domain at one moment.

    :ivar devices: for each device its name (``virtio-disk0``, ``net0``) and, of a disk, its image
    """

    is_persistent: bool
    devices: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, domain: Domain) -> Shape:
        """Ask libvirt, which needs a round trip or two."""
        found = set()
        for element in domain.tree().iterfind("devices/*"):
            alias = element.find("alias")
            if alias is not None:
                found.add((alias.get("name", ""), address_of(element) if element.tag == "disk" else ""))
        return cls(domain.is_persistent(), frozenset(found))

    def changes_to(self, later: Shape) -> str:
        """What is different later, in a few words; empty where nothing is."""
        found = []
        if self.is_persistent and not later.is_persistent:
            found.append("it was undefined")
        before, after = dict(self.devices), dict(later.devices)
        for name in sorted(before.keys() | after.keys()):
            if name not in after:
                found.append(f"{name} was detached")
            elif name not in before:
                found.append(f"{name} was attached")
            elif before[name] != after[name]:
                found.append(f"{name} has another image")
        return ", ".join(found)


def check_unchanged(vm: str, domains: Domains, name: str, before: Shape) -> None:
    """See that the domain is still what it was.

    :raises VmGone: it has ended
    :raises HypervisorError: it was changed
    """
    try:
        domain = domains.find(name)
    except UnknownVm as e:
        raise VmGone(f"VM {vm!r} ended during its capture, and libvirt has forgotten it") from e
    if not domain.is_active():
        raise VmGone(f"VM {vm!r} ended during its capture ({domain.why_shut_off()})")
    if changes := before.changes_to(Shape.of(domain)):
        raise HypervisorError(f"VM {vm!r} was changed during its capture: {changes}", cure="back it up again")
