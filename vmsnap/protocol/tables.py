"""The protocols themselves, literally. Change a protocol here and nowhere else."""

from __future__ import annotations

from vmsnap.protocol.words import Compensation as C
from vmsnap.protocol.words import Condition, Protocol
from vmsnap.protocol.words import Instruction as I
from vmsnap.protocol.words import State as S

BACKUP_LIVE = Protocol(
    name="backup, mode live",
    transitions={
        (S.READY, I.CHECK): S.CHECKED,
        (S.CHECKED, I.PREPARE): S.PREPARED,
        (S.PREPARED, I.PAUSE): S.PAUSED,
        (S.PAUSED, I.SNAPSHOT): S.SNAPSHOTTED,
        (S.PAUSED, I.DUPLICATE): S.DUPLICATED,
        (S.SNAPSHOTTED, I.DUPLICATE): S.CAPTURED,
        (S.DUPLICATED, I.SNAPSHOT): S.CAPTURED,
        (S.CAPTURED, I.RESUME): S.RESUMED,
        (S.RESUMED, I.STORE): S.STORED,
        (S.STORED, I.KEEP): S.KEPT,
        (S.KEPT, I.RELEASE): S.RELEASED,
        (S.RELEASED, I.NOTIFY): S.DONE,
    },
    compensations={
        I.PREPARE: (C.RESUME_VM, C.ABANDON_CAPTURE, C.DELETE_SNAPSHOTS, C.DISCARD_DUPLICATE),
        I.PAUSE: (C.RESUME_VM,),
        I.SNAPSHOT: (C.RESUME_VM, C.DELETE_SNAPSHOTS),
        I.DUPLICATE: (C.RESUME_VM, C.ABANDON_CAPTURE, C.DISCARD_DUPLICATE),
        I.RESUME: (C.RESUME_VM,),
        I.STORE: (C.DROP_UNCOMMITTED, C.DELETE_SNAPSHOTS, C.DISCARD_DUPLICATE),
        # Once it is held it is the user's: what is left to be undone then are the snapshots.
        I.KEEP: (C.REMOVE_DISKS, C.DELETE_SNAPSHOTS, C.DISCARD_DUPLICATE),
        I.RELEASE: (C.DELETE_SNAPSHOTS, C.DISCARD_DUPLICATE),
    },
    conditions={I.RESUME: Condition.EXECUTING, I.KEEP: Condition.KEEP},
    window=frozenset({I.PAUSE, I.SNAPSHOT, I.DUPLICATE, I.RESUME}),
)

BACKUP_CONSISTENT = Protocol(
    name="backup, mode consistent",
    transitions={
        (S.READY, I.CHECK): S.CHECKED,
        (S.CHECKED, I.PREPARE): S.PREPARED,
        (S.PREPARED, I.PAUSE): S.PAUSED,
        (S.PAUSED, I.SNAPSHOT): S.SNAPSHOTTED,
        (S.PAUSED, I.DUPLICATE): S.DUPLICATED,
        (S.SNAPSHOTTED, I.DUPLICATE): S.CAPTURED,
        (S.DUPLICATED, I.SNAPSHOT): S.CAPTURED,
        (S.CAPTURED, I.RESUME): S.RESUMED,
        (S.RESUMED, I.LOAD): S.LOADED,
        (S.LOADED, I.SWITCH_DISKS): S.SWITCHED,
        (S.SWITCHED, I.CUT_NETWORK): S.CUT,
        (S.CUT, I.RESUME_DUPLICATE): S.DUPLICATE_RESUMED,
        (S.DUPLICATE_RESUMED, I.AWAIT_EXECUTING): S.DUPLICATE_EXECUTING,
        (S.DUPLICATE_EXECUTING, I.SHUT_DOWN): S.SHUTTING_DOWN,
        (S.SHUTTING_DOWN, I.AWAIT_STOPPED): S.DUPLICATE_STOPPED,
        (S.DUPLICATE_STOPPED, I.STORE): S.STORED,
        (S.STORED, I.KEEP): S.KEPT,
        (S.KEPT, I.RELEASE): S.RELEASED,
        (S.RELEASED, I.NOTIFY): S.DONE,
    },
    compensations={
        **BACKUP_LIVE.compensations,
        I.LOAD: (C.DESTROY_LOADED, C.REMOVE_DISKS, C.DISCARD_DUPLICATE),
        I.RELEASE: (C.DESTROY_LOADED, C.REMOVE_DISKS, C.DELETE_SNAPSHOTS, C.DISCARD_DUPLICATE),
    },
    # A guest that does not shut down: the backup fails, or what was captured live is stored instead.
    conditions={**BACKUP_LIVE.conditions, I.AWAIT_STOPPED: Condition.ENDED},
    window=BACKUP_LIVE.window,
)

# The disks are held within the pause, and their snapshots taken after it, which may be slow. The overlays have the
# guest's newest data: they go back before anything else is removed.
BACKUP_LIVE_FROZEN = Protocol(
    name="backup, mode live, disks frozen",
    transitions={
        (S.READY, I.CHECK): S.CHECKED,
        (S.CHECKED, I.PREPARE): S.PREPARED,
        (S.PREPARED, I.PAUSE): S.PAUSED,
        (S.PAUSED, I.FREEZE): S.FROZEN,
        (S.PAUSED, I.DUPLICATE): S.DUPLICATED,
        (S.FROZEN, I.DUPLICATE): S.CAPTURED,
        (S.DUPLICATED, I.FREEZE): S.CAPTURED,
        (S.CAPTURED, I.RESUME): S.RESUMED,
        (S.RESUMED, I.SNAPSHOT): S.SNAPSHOTTED,
        (S.SNAPSHOTTED, I.THAW): S.THAWED,
        (S.THAWED, I.STORE): S.STORED,
        (S.STORED, I.KEEP): S.KEPT,
        (S.KEPT, I.RELEASE): S.RELEASED,
        (S.RELEASED, I.NOTIFY): S.DONE,
    },
    compensations={
        **BACKUP_LIVE.compensations,
        I.PREPARE: (C.RESUME_VM, C.ABANDON_CAPTURE, C.THAW_DISKS, C.DELETE_SNAPSHOTS, C.DISCARD_DUPLICATE),
        I.FREEZE: (C.RESUME_VM, C.THAW_DISKS, C.DELETE_SNAPSHOTS),
        I.SNAPSHOT: (C.ABANDON_CAPTURE, C.THAW_DISKS, C.DELETE_SNAPSHOTS),
        I.THAW: (C.THAW_DISKS,),
    },
    conditions=BACKUP_LIVE.conditions,
    window=frozenset({I.PAUSE, I.FREEZE, I.DUPLICATE, I.RESUME}),
)

BACKUP_CONSISTENT_FROZEN = Protocol(
    name="backup, mode consistent, disks frozen",
    transitions={
        (S.READY, I.CHECK): S.CHECKED,
        (S.CHECKED, I.PREPARE): S.PREPARED,
        (S.PREPARED, I.PAUSE): S.PAUSED,
        (S.PAUSED, I.FREEZE): S.FROZEN,
        (S.PAUSED, I.DUPLICATE): S.DUPLICATED,
        (S.FROZEN, I.DUPLICATE): S.CAPTURED,
        (S.DUPLICATED, I.FREEZE): S.CAPTURED,
        (S.CAPTURED, I.RESUME): S.RESUMED,
        (S.RESUMED, I.SNAPSHOT): S.SNAPSHOTTED,
        (S.SNAPSHOTTED, I.THAW): S.THAWED,
        (S.THAWED, I.LOAD): S.LOADED,
        (S.LOADED, I.SWITCH_DISKS): S.SWITCHED,
        (S.SWITCHED, I.CUT_NETWORK): S.CUT,
        (S.CUT, I.RESUME_DUPLICATE): S.DUPLICATE_RESUMED,
        (S.DUPLICATE_RESUMED, I.AWAIT_EXECUTING): S.DUPLICATE_EXECUTING,
        (S.DUPLICATE_EXECUTING, I.SHUT_DOWN): S.SHUTTING_DOWN,
        (S.SHUTTING_DOWN, I.AWAIT_STOPPED): S.DUPLICATE_STOPPED,
        (S.DUPLICATE_STOPPED, I.STORE): S.STORED,
        (S.STORED, I.KEEP): S.KEPT,
        (S.KEPT, I.RELEASE): S.RELEASED,
        (S.RELEASED, I.NOTIFY): S.DONE,
    },
    compensations={
        **BACKUP_LIVE_FROZEN.compensations,
        I.LOAD: BACKUP_CONSISTENT.compensations[I.LOAD],
        I.RELEASE: BACKUP_CONSISTENT.compensations[I.RELEASE],
    },
    conditions=BACKUP_CONSISTENT.conditions,
    window=BACKUP_LIVE_FROZEN.window,
)

RESTORE = Protocol(
    name="restore",
    transitions={
        (S.READY, I.LOAD): S.LOADED,
        (S.LOADED, I.SWITCH_DISKS): S.SWITCHED,
        (S.SWITCHED, I.CUT_NETWORK): S.CUT,
        (S.CUT, I.RESUME_DUPLICATE): S.DUPLICATE_RESUMED,
        (S.DUPLICATE_RESUMED, I.AWAIT_EXECUTING): S.DUPLICATE_EXECUTING,
        (S.DUPLICATE_EXECUTING, I.NOTIFY): S.DONE,
    },
    compensations={I.LOAD: (C.DESTROY_LOADED, C.DISCARD_DUPLICATE, C.REMOVE_DISKS)},
    conditions={
        I.CUT_NETWORK: Condition.ISOLATED,
        I.RESUME_DUPLICATE: Condition.RUN,
        I.AWAIT_EXECUTING: Condition.RUN,
    },
)

CONSOLIDATE = Protocol(
    name="consolidate",
    transitions={
        (S.READY, I.LOAD): S.LOADED,
        (S.LOADED, I.SWITCH_DISKS): S.SWITCHED,
        (S.SWITCHED, I.CUT_NETWORK): S.CUT,
        (S.CUT, I.RESUME_DUPLICATE): S.DUPLICATE_RESUMED,
        (S.DUPLICATE_RESUMED, I.AWAIT_EXECUTING): S.DUPLICATE_EXECUTING,
        (S.DUPLICATE_EXECUTING, I.SHUT_DOWN): S.SHUTTING_DOWN,
        (S.SHUTTING_DOWN, I.AWAIT_STOPPED): S.DUPLICATE_STOPPED,
        (S.DUPLICATE_STOPPED, I.STORE): S.STORED,
        (S.STORED, I.RELEASE): S.RELEASED,
        (S.RELEASED, I.NOTIFY): S.DONE,
    },
    compensations={
        I.LOAD: (C.DESTROY_LOADED, C.DISCARD_DUPLICATE, C.REMOVE_DISKS),
        I.STORE: (C.DROP_UNCOMMITTED,),
        I.RELEASE: (C.DESTROY_LOADED, C.DISCARD_DUPLICATE),
    },
    conditions={I.STORE: Condition.STORE},
)

VERIFY_BOOT = Protocol(
    name="verify by booting",
    transitions={
        (S.READY, I.LOAD): S.LOADED,
        (S.LOADED, I.SWITCH_DISKS): S.SWITCHED,
        (S.SWITCHED, I.CUT_NETWORK): S.CUT,
        (S.CUT, I.RESUME_DUPLICATE): S.DUPLICATE_RESUMED,
        (S.DUPLICATE_RESUMED, I.AWAIT_EXECUTING): S.DUPLICATE_EXECUTING,
        (S.DUPLICATE_EXECUTING, I.AWAIT_LIFE): S.DUPLICATE_ALIVE,
        (S.DUPLICATE_ALIVE, I.SHUT_DOWN): S.SHUTTING_DOWN,
        (S.SHUTTING_DOWN, I.AWAIT_STOPPED): S.DUPLICATE_STOPPED,
        (S.DUPLICATE_STOPPED, I.RELEASE): S.RELEASED,
        (S.RELEASED, I.NOTIFY): S.DONE,
    },
    compensations={
        I.LOAD: (C.DESTROY_LOADED, C.DISCARD_DUPLICATE, C.REMOVE_DISKS),
        I.RELEASE: (C.DESTROY_LOADED, C.DISCARD_DUPLICATE, C.REMOVE_DISKS),
    },
    conditions={},
)

FAILOVER = Protocol(
    name="failover",
    transitions={
        (S.READY, I.FENCE): S.FENCED,
        (S.FENCED, I.LOAD): S.LOADED,
        (S.LOADED, I.SWITCH_DISKS): S.SWITCHED,
        (S.SWITCHED, I.RESUME_DUPLICATE): S.DUPLICATE_RESUMED,
        (S.DUPLICATE_RESUMED, I.AWAIT_EXECUTING): S.DUPLICATE_EXECUTING,
        (S.DUPLICATE_EXECUTING, I.NOTIFY): S.DONE,
    },
    # The duplicate and its disks are the only copy left of the failed VM: neither is ever removed. One that has begun
    # to run has written to its disks, so there is no way back from there.
    compensations={I.LOAD: (C.SETTLE_TAKEOVER,)},
    conditions={},
)

PROTOCOLS: tuple[Protocol, ...] = (
    BACKUP_LIVE,
    BACKUP_CONSISTENT,
    BACKUP_LIVE_FROZEN,
    BACKUP_CONSISTENT_FROZEN,
    RESTORE,
    CONSOLIDATE,
    FAILOVER,
    VERIFY_BOOT,
)
