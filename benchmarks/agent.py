"""How long the agent's pages take with ten thousand VMs and a hundred thousand backups in the tables.

``python -m benchmarks.agent`` asks the application itself, without a network, each page twenty times, and prints the
median and the longest.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.agent_crowd import BACKUPS_EACH, VMS, fill
from vmsnap.agent.api.access import Door
from vmsnap.agent.api.app import create_app
from vmsnap.agent.api.context import Context
from vmsnap.agent.house import Blueprint
from vmsnap.agent.settings import AgentSettings

ROUNDS = 20
PAGES = {
    "VMs, first page": "/api/v1/vms",
    "VMs, last page": "/api/v1/vms?after=vm09899",
    "VMs by a part of the name": "/api/v1/vms?match=999",
    "one VM": "/api/v1/vms/vm05000",
    "timeline of 50 VMs": "/api/v1/timeline?after=vm05000&days=400",
    "one backup": "/api/v1/backups/vm09999-20260110T",
    "backups, first page": "/api/v1/backups?limit=100",
    "backups, in the middle": "/api/v1/backups?limit=100&before=2026-01-05T12:00:00Z,",
    "backups of one VM": "/api/v1/backups?vm=vm05000&limit=200",
    "jobs": "/api/v1/jobs?limit=50",
    "summary": "/api/v1/summary",
    "metrics": "/metrics",
}


async def measure(client: httpx.AsyncClient, path: str) -> list[float]:
    """The seconds of each round."""
    found = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        answer = await client.get(path)
        found.append(time.perf_counter() - begun)
        answer.raise_for_status()
    return found


async def main() -> None:
    """Fill the tables, ask, print."""
    with tempfile.TemporaryDirectory() as folder:
        blueprint = Blueprint(Path(folder), AgentSettings(), repository="/r")
        context = Context(blueprint, lambda: None, lambda _: None, lambda: 0.0)
        fill(context.house())
        app = create_app(context, Door("http", frozenset({"localhost"}), trusted=True))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            print(f"| {VMS} VMs, {VMS * BACKUPS_EACH} backups | median | longest |\n| --- | ---: | ---: |")
            for name, path in PAGES.items():
                seconds = await measure(client, path)
                print(f"| {name} | {statistics.median(seconds) * 1e3:.0f} ms | {max(seconds) * 1e3:.0f} ms |")


if __name__ == "__main__":
    asyncio.run(main())
