"""The protocols of vmsnap as pure data: states, instructions, transitions, compensations. No I/O, no drivers.

Everything that decides what may follow what stands in `vmsnap.protocol.tables`; the controller only carries it out, the
diagrams in docs/ are drawn from it and the property tests run over it.
"""

from vmsnap.protocol.tables import (
    BACKUP_CONSISTENT,
    BACKUP_CONSISTENT_FROZEN,
    BACKUP_LIVE,
    BACKUP_LIVE_FROZEN,
    CONSOLIDATE,
    FAILOVER,
    PROTOCOLS,
    RESTORE,
    VERIFY_BOOT,
)
from vmsnap.protocol.words import Compensation, Condition, Instruction, Protocol, State

__all__ = [
    "BACKUP_CONSISTENT",
    "BACKUP_CONSISTENT_FROZEN",
    "BACKUP_LIVE",
    "BACKUP_LIVE_FROZEN",
    "CONSOLIDATE",
    "FAILOVER",
    "PROTOCOLS",
    "RESTORE",
    "VERIFY_BOOT",
    "Compensation",
    "Condition",
    "Instruction",
    "Protocol",
    "State",
]
