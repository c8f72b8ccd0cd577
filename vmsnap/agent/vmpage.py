"""VMs as the API shows them: a page of them, each with its last backup and what is done with it now, in a bounded
number of queries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vmsnap.agent.house import House
from vmsnap.agent.notices import job_document
from vmsnap.errors import UnknownVm

DOTS_EACH = 100
"""So many backups of one VM are in a timeline at most, the newest."""


def vm_page(house: House, *, after: str = "", limit: int = 100, match: str = "") -> list[dict[str, Any]]:
    """At most `limit` VMs behind the name `after`, by name; those whose name holds `match`."""
    rows = house.database.rows(
        "SELECT * FROM vm WHERE vm > ? AND instr(vm, ?) > 0 ORDER BY vm LIMIT ?", after, match, limit
    )
    return _documents(house, rows)


def timeline_page(
    house: House, since: str, *, after: str = "", limit: int = 50, match: str = ""
) -> list[dict[str, Any]]:
    """At most `limit` VMs as in `vm_page`, without duplicates, each with its backups from `since` on."""
    rows = house.database.rows(
        "SELECT vm FROM vm WHERE vm > ? AND kind = 'working' AND instr(vm, ?) > 0 ORDER BY vm LIMIT ?",
        after,
        match,
        limit,
    )
    found = house.catalogue.since([row["vm"] for row in rows], since, DOTS_EACH)
    return [{"vm": vm, "backups": backups} for vm, backups in found.items()]


def one_vm(house: House, vm: str) -> dict[str, Any]:
    """One VM.

    :raises UnknownVm: it is not registered
    """
    found = _documents(house, house.database.rows("SELECT * FROM vm WHERE vm = ?", vm))
    if not found:
        raise UnknownVm(f"no VM named {vm[:100]!r} is registered")
    return found[0]


def _documents(house: House, rows: Sequence[Any]) -> list[dict[str, Any]]:
    names = [row["vm"] for row in rows]
    marks = ",".join("?" * len(names))
    disks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in house.database.rows(f"SELECT * FROM disk WHERE vm IN ({marks}) ORDER BY vm, position", *names):
        disks[row["vm"]].append({"device": row["device"], "address": row["address"], "mechanism": row["mechanism"]})
    newest = house.catalogue.newest(names)
    counted = house.database.rows(
        f"SELECT vm, count(*) AS number FROM catalogue WHERE vm IN ({marks}) GROUP BY vm", *names
    )
    counts = {row["vm"]: row["number"] for row in counted}
    held = house.database.rows(f"SELECT vm, duplicate FROM held WHERE vm IN ({marks})", *names)
    duplicates = {row["vm"]: row["duplicate"] for row in held}
    jobs = {job.vm: job_document(job) for job in house.jobs.open() if job.vm in disks}
    return [
        {
            "vm": row["vm"],
            "hypervisor": row["hypervisor"],
            "state": row["state"],
            "resume_flag": bool(row["resume_flag"]),
            "kind": row["kind"],
            "duplicate_of": row["duplicate_of"],
            "options": json.loads(row["options"]),
            "disks": disks[row["vm"]],
            "backups": counts.get(row["vm"], 0),
            "last_backup": newest.get(row["vm"]),
            "held_duplicate": duplicates.get(row["vm"]),
            "job": jobs.get(row["vm"]),
        }
        for row in rows
    ]
