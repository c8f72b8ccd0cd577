"""The words that the protocol tables are written in."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


class Instruction(enum.Enum):
    """One step of a protocol; the controller gives it to a driver."""

    CHECK = "check"
    """Ask the hypervisor what the VM is, and whether it can be captured."""
    PREPARE = "prepare"
    """All that is slow, with the guest running."""
    PAUSE = "pause"
    """Stop the vCPUs if they execute, drain and flush; then state := stopped, resume_flag := 1."""
    SNAPSHOT = "snapshot"
    """Fix the disks; of those that are held, after the pause."""
    FREEZE = "freeze"
    """Hold the disks at this instant: what the guest writes from now on goes to overlays."""
    THAW = "thaw"
    """Put the overlays back."""
    DUPLICATE = "duplicate"
    """Fix memory and vCPU state."""
    RESUME = "resume"
    """Let the vCPUs run; clears resume_flag."""
    STORE = "store"
    """Memory and disks into the repository, visible by one commit."""
    KEEP = "keep"
    """Make lasting disks for the duplicate, and hold it in memory."""
    RELEASE = "release"
    """Remove what was made for the capture and is no longer needed."""
    NOTIFY = "notify"
    """Tell who wants to know."""
    LOAD = "load"
    """Make a duplicate exist as a VM, stopped."""
    SWITCH_DISKS = "switch_disks"
    """Connect the duplicate to its own disks, and see that it is so."""
    CUT_NETWORK = "cut_network"
    """Let no packet in or out of the duplicate, and see that it is so."""
    RESUME_DUPLICATE = "resume_duplicate"
    """Let the duplicate run."""
    AWAIT_EXECUTING = "await_executing"
    """See that the duplicate runs."""
    AWAIT_LIFE = "await_life"
    """See that its guest lives."""
    SHUT_DOWN = "shut_down"
    """Ask the duplicate's guest to end in order."""
    AWAIT_STOPPED = "await_stopped"
    """See that it has ended by itself."""
    FENCE = "fence"
    """Prove that the working VM does not run and will not."""


class State(enum.Enum):
    """How far a protocol has come."""

    READY = "ready"
    CHECKED = "checked"
    PREPARED = "prepared"
    PAUSED = "paused"
    SNAPSHOTTED = "snapshotted"
    FROZEN = "frozen"
    DUPLICATED = "duplicated"
    CAPTURED = "captured"
    RESUMED = "resumed"
    THAWED = "thawed"
    LOADED = "loaded"
    SWITCHED = "switched"
    CUT = "cut"
    DUPLICATE_RESUMED = "duplicate resumed"
    DUPLICATE_EXECUTING = "duplicate executing"
    SHUTTING_DOWN = "shutting down"
    DUPLICATE_STOPPED = "duplicate stopped"
    DUPLICATE_ALIVE = "duplicate alive"
    FENCED = "fenced"
    STORED = "stored"
    KEPT = "kept"
    RELEASED = "released"
    DONE = "done"


class Condition(enum.Enum):
    """When an instruction is carried out; where it does not hold, the instruction is passed over."""

    EXECUTING = "the VM was executing"
    ISOLATED = "isolation was asked for"
    RUN = "the duplicate is to run"
    ENDED = "its guest has shut down in order"
    KEEP = "the duplicate is to be held"
    STORE = "its disks are to be stored"


class Compensation(enum.Enum):
    """What undoes or completes an instruction after a failure or a crash. Each is idempotent."""

    RESUME_VM = "resume the VM"
    ABANDON_CAPTURE = "abandon the capture"
    THAW_DISKS = "thaw the disks"
    DELETE_SNAPSHOTS = "delete the snapshots"
    DISCARD_DUPLICATE = "discard the duplicate"
    DROP_UNCOMMITTED = "drop what was not committed"
    DESTROY_LOADED = "destroy the loaded duplicate"
    REMOVE_DISKS = "remove the duplicate's disks"
    SETTLE_TAKEOVER = "let the duplicate take the VM's place if it has begun to run, else put it back"


COMPENSATION_ORDER: tuple[Compensation, ...] = (
    Compensation.RESUME_VM,
    Compensation.ABANDON_CAPTURE,
    Compensation.THAW_DISKS,
    Compensation.SETTLE_TAKEOVER,
    Compensation.DESTROY_LOADED,
    Compensation.REMOVE_DISKS,
    Compensation.DELETE_SNAPSHOTS,
    Compensation.DISCARD_DUPLICATE,
    Compensation.DROP_UNCOMMITTED,
)
"""The guest first; what uses a thing goes before the thing."""


@dataclass(frozen=True)
class Protocol:
    """One protocol as a table.

    `transitions` gives the next state for a state and an instruction; what is not in it is not allowed. `compensations`
    gives for each instruction what sets things right when it was begun and the protocol does not reach its goal.
    `conditions` names the instructions that are passed over unless something holds. The instructions of `window`
    are those during which the guest may stand still.
    """

    name: str
    transitions: Mapping[tuple[State, Instruction], State]
    compensations: Mapping[Instruction, tuple[Compensation, ...]]
    conditions: Mapping[Instruction, Condition]
    window: frozenset[Instruction] = frozenset()
    start: State = State.READY
    goal: State = State.DONE

    def allowed(self, state: State) -> tuple[Instruction, ...]:
        """The instructions that may be given in `state`, the usual one first."""
        return tuple(instruction for at, instruction in self.transitions if at is state)

    def after(self, state: State, instruction: Instruction) -> State:
        """The state that `instruction` leads to.

        :raises KeyError: it may not be given in `state`
        """
        return self.transitions[state, instruction]

    def to_undo(self, begun: Collection[Instruction]) -> tuple[Compensation, ...]:
        """What sets things right after the instructions `begun`, in the order in which it is done."""
        wanted = {compensation for instruction in begun for compensation in self.compensations.get(instruction, ())}
        return tuple(compensation for compensation in COMPENSATION_ORDER if compensation in wanted)

    def paths(self) -> Sequence[tuple[Instruction, ...]]:
        """Every order of instructions that leads from start to goal."""
        found: list[tuple[Instruction, ...]] = []
        open_paths: list[tuple[State, tuple[Instruction, ...]]] = [(self.start, ())]
        while open_paths:
            state, path = open_paths.pop(0)
            if state is self.goal:
                found.append(path)
            else:
                open_paths += [(self.after(state, step), (*path, step)) for step in self.allowed(state)]
        return found
