"""What this host has done, counted. The database counts by itself, in the transaction in which something is entered,
whichever process enters it: so no count is lost with a process, and none goes down when old rows are forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsnap.database import Database

PAUSE_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Up to which of these a pause was is counted; longer ones by themselves."""

_ADDED = "ON CONFLICT DO UPDATE SET value = value + excluded.value"
_BUCKET = " ".join(
    f"WHEN json_extract(NEW.result, '$.pause_seconds') <= {edge!r} THEN '{edge!r}'" for edge in PAUSE_BUCKETS_SECONDS
)
SCHEMA = (
    """
CREATE TABLE counter (
    name          TEXT NOT NULL,
    labels        TEXT NOT NULL,              -- JSON: a list of texts
    value         REAL NOT NULL,
    PRIMARY KEY (name, labels)
) STRICT, WITHOUT ROWID
""",
    f"""
CREATE TRIGGER job_counted AFTER UPDATE OF ended_ns ON job WHEN OLD.ended_ns IS NULL AND NEW.ended_ns IS NOT NULL BEGIN
    INSERT INTO counter VALUES
        ('jobs', json_array(NEW.verb, NEW.state, CAST(coalesce(NEW.exit_code, '') AS TEXT)), 1) {_ADDED};
END
""",
    f"""
CREATE TRIGGER backup_counted AFTER UPDATE OF ended_ns ON job
WHEN OLD.ended_ns IS NULL AND NEW.state = 'done' AND NEW.verb = 'backup' AND json_valid(NEW.result) BEGIN
    INSERT INTO counter SELECT name, '[]', json_extract(NEW.result, '$.' || name)
        FROM (SELECT 'read_bytes' AS name UNION SELECT 'stored_bytes' UNION SELECT 'pause_seconds')
        WHERE json_extract(NEW.result, '$.' || name) IS NOT NULL {_ADDED};
    INSERT INTO counter SELECT 'pauses', json_array(CASE {_BUCKET} ELSE '+Inf' END), 1
        WHERE json_extract(NEW.result, '$.pause_seconds') IS NOT NULL {_ADDED};
END
""",
    f"""
CREATE TRIGGER operation_counted AFTER UPDATE OF outcome ON operation
WHEN OLD.outcome IS NULL AND NEW.outcome IS NOT NULL BEGIN
    INSERT INTO counter VALUES ('operations', json_array(NEW.protocol, NEW.outcome), 1) {_ADDED};
END
""",
    f"""
CREATE TRIGGER failure_counted AFTER UPDATE OF status ON entry
WHEN OLD.status <> 'failed' AND NEW.status = 'failed' BEGIN
    INSERT INTO counter SELECT 'failed_instructions', json_array(protocol, NEW.instruction), 1
        FROM operation WHERE operation = NEW.operation {_ADDED};
END
""",
    f"""
CREATE TRIGGER deed_counted AFTER INSERT ON entry WHEN NEW.instruction IN ('guardian', 'recover') BEGIN
    INSERT INTO counter VALUES ('interventions', json_array(NEW.instruction), 1) {_ADDED};
END
""",
)
"""Statements, one each. Counted are: ``jobs`` by verb, state and exit code; of backups that were jobs ``read_bytes``,
``stored_bytes``, ``pause_seconds``, and ``pauses`` by bucket; ``operations`` of the journal by protocol and outcome;
``failed_instructions`` by protocol and instruction; ``interventions`` by who intervened.
"""


def read_counters(database: Database) -> Mapping[str, Mapping[tuple[str, ...], float]]:
    """All counts: by name, then by labels.

    :raises VmsnapError: the database cannot be read
    """
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for row in database.rows("SELECT name, labels, value FROM counter"):
        found.setdefault(row["name"], {})[tuple(json.loads(row["labels"]))] = row["value"]
    return found
