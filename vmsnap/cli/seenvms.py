"""The VMs that a driver sees on this host, with what it can do with each: as a document, and as a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import click

from vmsnap.cli import output
from vmsnap.controller.choosing import choose_mechanisms
from vmsnap.controller.drivers import Drivers
from vmsnap.errors import VmsnapError
from vmsnap.model import SeenVm

_NO_WAY = "no"


def entries(seen: Sequence[SeenVm], registered: Collection[str], drivers: Drivers) -> list[dict[str, Any]]:
    """One entry for each VM that is seen or registered. What can be done with it is told by those drivers that look."""
    known = {found.vm: found for found in seen}
    document: list[dict[str, Any]] = []
    for name in sorted({*known, *registered}):
        entry: dict[str, Any] = {"vm": name, "seen": name in known, "registered": name in registered}
        if name in known and known[name].state is not None:
            entry |= _abilities(known[name], drivers)
        document.append(entry)
    return document


def show(document: Sequence[dict[str, Any]]) -> None:
    """The table; reasons and notes stand below it, one line each."""
    rows = [(e["vm"], "yes" if e["seen"] else "no", "yes" if e["registered"] else "no") for e in document]
    if not any("live" in entry for entry in document):
        output.table(("vm", "seen", "registered"), rows)
        return
    more = [_cells(entry) for entry in document]
    output.table(
        ("vm", "seen", "registered", "state", "live", "disks"),
        [(*row, *cells) for row, cells in zip(rows, more, strict=True)],
    )
    for entry in document:
        for line in (*entry.get("why_not", ()), *entry.get("notes", ())):
            click.echo(output.printable(f"{entry['vm']}: {line}"))


def _abilities(seen: SeenVm, drivers: Drivers) -> dict[str, Any]:
    disks, why_not = [], list(seen.why_not)
    handled = True
    for disk in seen.disks:
        mechanism = None
        if disk.read_only:
            continue
        try:
            (row,) = choose_mechanisms(drivers, (disk,))
            mechanism = row.mechanism
        except VmsnapError as e:
            handled = False
            why_not.append(e.message)
        disks.append({"device": disk.device, "address": disk.address, "mechanism": mechanism})
    return {
        "state": None if seen.state is None else seen.state.value,
        "live": bool(seen.captures) and handled,
        "captures": list(seen.captures),
        "disks": disks,
        "why_not": why_not,
        "notes": list(seen.notes),
    }


def _cells(entry: dict[str, Any]) -> tuple[str, str, str]:
    if "live" not in entry:
        return "-", "-", "-"
    disks = ", ".join(f"{disk['device']} by {disk['mechanism'] or 'nothing'}" for disk in entry["disks"])
    return entry["state"], ", ".join(entry["captures"]) if entry["live"] else _NO_WAY, disks or "-"
