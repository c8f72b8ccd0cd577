"""Finds what carries our tag and what nobody answers for: the host's database was lost or damaged, or put back to an
older state. It may be somebody's all the same, so nothing of it is removed that the user has not named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress

from vmsnap import registry
from vmsnap.controller.drivers import Drivers
from vmsnap.controller.kept_snapshots import KeptSnapshots
from vmsnap.database import Database
from vmsnap.errors import NotFound, UsageError, VmsnapError
from vmsnap.model import OwnedResource, to_json
from vmsnap.vmtable import VmTable


class Strays:
    """What the installed drivers find on this host, without what the host's database knows."""

    def __init__(self, drivers: Drivers, database: Database, kept: KeptSnapshots) -> None:
        self._drivers = drivers
        self._database = database
        self._kept = kept

    def find(self, tell: Callable[[str], None]) -> list[OwnedResource]:
        """All of them, by driver, kind and name. Blocks while drivers look; changes nothing.

        :param tell: is called with a line for each driver that cannot look now, whose strays are left out
        """
        found, problems = self._look()
        for name, problem in problems.items():
            tell(f"{name}: {problem}")
        return found

    def remove(self, names: Sequence[str]) -> list[OwnedResource]:
        """Remove the strays of these names, and what belongs to the same snapshot; returns those that are gone.

        :raises NotFound: one of them is no stray; nothing was removed
        :raises VmsnapError: a driver could not remove one; those before it are gone
        """
        before, _ = self._look()
        chosen = [each for each in before if each.name in names]
        if missing := set(names) - {each.name for each in chosen}:
            raise NotFound(f"there is no stray named {min(missing)!r}", cure="see: vmsnap strays")
        for each in chosen:
            self._remove(each)
        left, problems = self._look()
        # Of a driver that cannot look any more, no more is known to be gone than what it has just removed.
        gone = [each for each in before if each not in left]
        return [each for each in gone if each in chosen or each.driver not in problems]

    def _look(self) -> tuple[list[OwnedResource], dict[str, VmsnapError]]:
        """What is found, and the drivers that could not look."""
        problems: dict[str, VmsnapError] = {}
        # What is made stands in the database before, and what is removed until after: so, looked at once more, what
        # comes and goes meanwhile is no stray.
        first = self._unknown(problems)
        again = set(self._unknown(problems)) if first else set()
        found = sorted((each for each in first if each in again), key=lambda each: (each.driver, each.kind, each.name))
        return found, problems

    def _unknown(self, problems: dict[str, VmsnapError]) -> list[OwnedResource]:
        owned = list(self._owned(problems))
        known = self._known()
        return [each for each in owned if not _is_named(each, known)]

    def _owned(self, problems: dict[str, VmsnapError]) -> Iterator[OwnedResource]:
        for driver in registry.installed():
            if driver.driver is None:
                continue  # `vmsnap drivers` says why
            try:
                if driver.kind == "hypervisor":
                    with closing(self._drivers.hypervisor_of_host(driver.name, "strays")) as hypervisor:
                        yield from hypervisor.list_owned()
                elif driver.kind == "snapshot mechanism":
                    with closing(self._drivers.mechanism(driver.name)) as mechanism:
                        yield from mechanism.list_owned()
            except VmsnapError as e:
                # An appliance that is off keeps nobody from what others find.
                problems[driver.name] = e
        yield from self._on_disks()

    def _on_disks(self) -> Iterator[OwnedResource]:
        """What lies within VMs that are registered (again). One that cannot be asked now is passed over; why,
        `vmsnap doctor` says.
        """
        mechanisms = [each.name for each in registry.installed() if each.driver and each.kind == "snapshot mechanism"]
        for row in VmTable(self._database).rows():
            if row.kind != "working":
                continue
            with suppress(VmsnapError):
                with closing(self._drivers.hypervisor(row.hypervisor, row.vm, row.options)) as hypervisor:
                    disks = hypervisor.describe().disks
                for name in mechanisms:
                    with closing(self._drivers.mechanism(name)) as mechanism:
                        yield from mechanism.list_owned_on(disks)

    def _known(self) -> str:
        """All that the database says of what is on this host, as one text."""
        texts = [row["data"] for row in self._database.rows("SELECT data FROM resource WHERE gone = 0")]
        texts += [row["data"] for row in self._database.rows("SELECT data FROM held")]
        texts += [to_json(row["vm"]) for row in self._database.rows("SELECT vm FROM vm")]
        texts.append(self._kept.known())
        own = self._database.rows("SELECT data FROM own_disk WHERE address IN (SELECT address FROM disk)")
        texts += [row["data"] for row in own]
        texts += [to_json(row["address"]) for row in self._database.rows("SELECT address FROM disk")]
        return "\n".join(texts)

    def _remove(self, stray: OwnedResource) -> None:
        if stray.driver not in registry.names(registry.HYPERVISORS):
            with closing(self._drivers.mechanism(stray.driver)) as mechanism:
                mechanism.remove_owned(stray)
            return
        purpose = "strays" if stray.kind == "overlay" else stray.name  # that of an overlay is no VM's
        with closing(self._drivers.hypervisor_of_host(stray.driver, purpose)) as hypervisor:
            if stray.kind == "duplicate":
                hypervisor.discard_duplicate(stray.name)
            elif stray.kind == "vm":
                hypervisor.destroy()
            elif stray.kind == "overlay":
                hypervisor.thaw_owned(stray)
            else:
                raise UsageError(f"the {stray.kind} {stray.name} of {stray.driver} cannot be removed by vmsnap")


def _is_named(owned: OwnedResource, known: str) -> bool:
    """Whether the database knows it: by its name, its tag, or, what lies in a disk, by that."""
    words = {owned.name, owned.tag, owned.name.partition(" of ")[2]} - {""}
    return any(to_json(word) in known for word in words)
