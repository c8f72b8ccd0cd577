"""The catalogue: which backups there are, as this host last saw them. A cache in its database, so that a hundred
thousand can be paged through without asking the storage. What counts is the repository.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vmsnap.database import Database
from vmsnap.errors import UnknownBackup


class Catalogue:
    """The backups of all repositories that the agent works with. Each change is one transaction, and can be lost."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def known(self, repository: str) -> frozenset[str]:
        """The ids of its backups."""
        rows = self._database.rows("SELECT backup FROM catalogue WHERE repository = ?", repository)
        return frozenset(row["backup"] for row in rows)

    def enter(self, repository: str, backups: Iterable[Mapping[str, Any]]) -> None:
        """Enter backups, as ``vmsnap show`` reports them, or enter them anew."""
        with self._database.transaction(durable=False) as db:
            db.executemany(
                "INSERT OR REPLACE INTO catalogue VALUES (?, ?, ?, ?, ?)",
                [(repository, each["backup"], each["vm"], each["time"], json.dumps(each)) for each in backups],
            )

    def strike(self, repository: str, backups: Collection[str]) -> None:
        """Strike out backups that are no longer there. Idempotent."""
        with self._database.transaction(durable=False) as db:
            db.executemany(
                "DELETE FROM catalogue WHERE repository = ? AND backup = ?", [(repository, each) for each in backups]
            )

    def page(self, *, vm: str = "", before: tuple[str, str] | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """At most `limit` backups, the newest first, behind the one whose time and id are `before`; of one VM or all.

        Each is as ``vmsnap show`` reports it, with its repository.
        """
        conditions, values = ["vm = ?"] if vm else [], [vm] if vm else []
        if before is not None:
            conditions.append("(time, backup) < (?, ?)")
            values += before
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        query = f"SELECT repository, data FROM catalogue {where} ORDER BY time DESC, backup DESC LIMIT ?"
        return [_document(row) for row in self._database.rows(query, *values, limit)]

    def get(self, backup: str) -> dict[str, Any]:
        """One backup, by its id, or by a beginning of it that no other has.

        :raises UnknownBackup: it is not known here
        """
        rows = self._database.rows("SELECT repository, data FROM catalogue WHERE backup = ? LIMIT 1", backup)
        if not rows and backup:
            # A range, and not LIKE: one look at the index, whatever is in the name.
            query = "SELECT repository, data FROM catalogue WHERE backup >= ? AND backup < ? GROUP BY backup LIMIT 2"
            rows = self._database.rows(query, backup, backup + "\U0010ffff")
        if len(rows) != 1:
            number = "no backup" if not rows else "more than one backup"
            raise UnknownBackup(f"{number} {backup[:200]!r} is known", cure="see: vmsnap list, vmsnap agent refresh")
        return _document(rows[0])

    def newest(self, vms: Collection[str] | None = None, repository: str = "") -> dict[str, dict[str, Any]]:
        """The newest backup of each VM, or of those `vms`, that has one; in one repository or all."""
        condition, values = ("AND c.repository = ?", (repository,)) if repository else ("", ())
        if vms is not None:
            # One look at the index each; callers ask for a page of them.
            query = f"SELECT repository, data FROM catalogue c WHERE vm = ? {condition}"
            asked = {vm: self._database.rows(f"{query} ORDER BY time DESC LIMIT 1", vm, *values) for vm in vms}
            return {vm: _document(rows[0]) for vm, rows in asked.items() if rows}
        # The maxima come from the index alone; only their rows are read.
        query = (
            "SELECT c.vm, c.repository, c.data FROM catalogue c JOIN (SELECT vm, max(time) AS time FROM catalogue c"
            f" WHERE 1 {condition} GROUP BY vm) m ON c.vm = m.vm AND c.time = m.time WHERE 1 {condition}"
        )
        return {row["vm"]: _document(row) for row in self._database.rows(query, *values, *values)}

    def since(self, vms: Collection[str], time: str, most: int) -> dict[str, list[dict[str, Any]]]:
        """The backups of each of those VMs from a time (UTC, RFC 3339) on, the newest first, at most so many of each:
        what a timeline shows of them.
        """
        query = (
            "SELECT backup, time, json_extract(data, '$.mode') AS mode, json_extract(data, '$.pause_seconds') AS pause"
            " FROM catalogue WHERE vm = ? AND time >= ? ORDER BY time DESC LIMIT ?"
        )
        return {
            vm: [
                {"backup": row["backup"], "time": row["time"], "mode": row["mode"], "pause_seconds": row["pause"]}
                for row in self._database.rows(query, vm, time, most)
            ]
            for vm in vms
        }

    def counts(self) -> dict[str, int]:
        """How many backups each VM has."""
        rows = self._database.rows("SELECT vm, count(*) AS number FROM catalogue GROUP BY vm")
        return {row["vm"]: row["number"] for row in rows}


def _document(row: Any) -> dict[str, Any]:
    return {**json.loads(row["data"]), "repository": row["repository"]}
