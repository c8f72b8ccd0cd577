"""What was done on this host, a line an instruction: the journal as a log, to explain a night afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmsnap.journal import Journal


@dataclass(frozen=True)
class LogLine:
    """One instruction of one operation, or what was done to set that operation right.

    `begun_ns` is nanoseconds since 1970; `seconds` is what it took, None for one that never ended. `status` is
    ``done``, ``failed``, ``passed over``, ``not reached``, ``begun``; for the last line of an operation, whose
    instruction is ``end``, it is the outcome of the whole: ``done``, ``failed``, ``recovered``, or ``going on`` and
    ``broken off`` where it has none. `backup` is the one that the operation has stored or uses, empty where there is
    none, or none yet. `message` is one line: what came of it, or why it failed.
    """

    begun_ns: int
    seconds: float | None
    vm: str
    operation: str
    protocol: str
    backup: str
    instruction: str
    status: str
    message: str = ""

    @property
    def bad(self) -> bool:
        """Whether it tells of a failure."""
        return self.status in ("failed", "broken off")


def log_lines(journal: Journal, vm: str | None = None, *, since_ns: int = 0) -> Iterator[LogLine]:
    """Yield the lines of all operations that began at `since_ns` or later, oldest operation first; of one VM or all.

    :raises VmsnapError: the journal cannot be read
    """
    for row in journal.operations(vm, since_ns=since_ns):
        for entry in journal.open_operation(row.operation).entries():
            seconds = None if entry.ended_ns is None else (entry.ended_ns - entry.begun_ns) / 1e9
            yield LogLine(
                entry.begun_ns,
                seconds,
                row.vm,
                row.operation,
                row.protocol,
                row.backup,
                entry.instruction,
                entry.status,
                entry.message,
            )
        outcome = row.outcome or ("going on" if row.worker_alive() else "broken off")
        took = None if row.ended_ns is None else (row.ended_ns - row.begun_ns) / 1e9
        ended_ns = row.begun_ns if row.ended_ns is None else row.ended_ns
        told = f"{f'backup {row.backup}, ' if row.backup else ''}process {row.pid}"
        yield LogLine(ended_ns, took, row.vm, row.operation, row.protocol, row.backup, "end", outcome, told)
