"""The tags of VMs, as their hypervisors last said: what schedules may name beside names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vmsnap.database import Database

PREFIX = "tag:"
"""What stands before a tag where a schedule names its VMs. No VM's name has a colon in it."""


class VmTags:
    """The tags of this host's VMs. Each change is one transaction; what is lost is asked for again."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def enter(self, vm: str, tags: Collection[str]) -> None:
        """Enter all tags that a VM has now; does nothing for one that is not registered."""
        with self._database.transaction(durable=False) as db:
            db.execute("DELETE FROM vm_tag WHERE vm = ?", (vm,))
            if db.execute("SELECT 1 FROM vm WHERE vm = ?", (vm,)).fetchone():
                db.executemany("INSERT INTO vm_tag VALUES (?, ?)", [(vm, tag) for tag in sorted(set(tags))])

    def all(self) -> Mapping[str, frozenset[str]]:
        """The tags of each VM that has any."""
        found: dict[str, set[str]] = {}
        for row in self._database.rows("SELECT vm, tag FROM vm_tag"):
            found.setdefault(row["vm"], set()).add(row["tag"])
        return {vm: frozenset(tags) for vm, tags in found.items()}
