"""The tables of a large host: ten thousand VMs, a hundred thousand backups. For tests of how much a page costs, and for
benchmarks of how long it takes.
"""

from __future__ import annotations

import json
import time

from vmsnap.agent.house import House

VMS, BACKUPS_EACH, JOBS = 10_000, 10, 20_000


def fill(house: House) -> None:
    """The tables as a large host has them."""
    document = {
        "mode": "live",
        "pause_seconds": 0.01,
        "stored_bytes": 1 << 20,
        "read_bytes": 1 << 24,
        "memory_bytes": 1 << 30,
    }
    with house.database.transaction() as db:
        db.executemany(
            "INSERT INTO vm VALUES (?, 'working', 'simulated', '{}', 'executing', 0, NULL, 0)",
            [(f"vm{number:05}",) for number in range(VMS)],
        )
        db.executemany(
            "INSERT INTO disk VALUES (?, 0, 'disk0', ?, 'file')",
            [(f"vm{number:05}", f"/srv/vm{number:05}") for number in range(VMS)],
        )
        rows = []
        for number in range(VMS * BACKUPS_EACH):
            vm, day = f"vm{number % VMS:05}", number // VMS + 1
            when = f"2026-01-{day:02}T{number % 24:02}:{number % 60:02}:00Z"
            backup = f"{vm}-202601{day:02}T{number % 24:02}{number % 60:02}00Z-{number:06x}"
            rows.append(("/r", backup, vm, when, json.dumps({**document, "backup": backup, "vm": vm, "time": when})))
        db.executemany("INSERT INTO catalogue VALUES (?, ?, ?, ?, ?)", rows)
        db.executemany(
            "INSERT INTO job (verb, arguments, vm, repository, schedule, attempt, not_before_ns, requester, state,"
            " created_ns, begun_ns, ended_ns, exit_code, settled)"
            " VALUES ('backup', '[]', ?, '/r', '', 1, 0, 'x', 'done', 0, 0, ?, 0, 1)",
            [(f"vm{number % VMS:05}", time.time_ns() - number * 10**9) for number in range(JOBS)],
        )
