"""The protocol tables: every statement here is about the tables alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmsnap.protocol import (
    BACKUP_CONSISTENT,
    BACKUP_CONSISTENT_FROZEN,
    BACKUP_LIVE,
    BACKUP_LIVE_FROZEN,
    CONSOLIDATE,
    FAILOVER,
    PROTOCOLS,
    RESTORE,
    VERIFY_BOOT,
    Compensation,
    Instruction,
    Protocol,
    State,
)
from vmsnap.protocol.words import COMPENSATION_ORDER

ROOT = Path(__file__).parent.parent
REMOVING = (Compensation.DELETE_SNAPSHOTS, Compensation.DISCARD_DUPLICATE, Compensation.REMOVE_DISKS)
BACKUPS = [BACKUP_LIVE, BACKUP_CONSISTENT, BACKUP_LIVE_FROZEN, BACKUP_CONSISTENT_FROZEN]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_every_state_is_reached_and_has_a_way_to_the_goal(protocol: Protocol) -> None:
    states = {state for state, _ in protocol.transitions} | set(protocol.transitions.values())
    on_paths = {protocol.start}
    for path in protocol.paths():
        state = protocol.start
        for instruction in path:
            state = protocol.after(state, instruction)
            on_paths.add(state)
        assert state is protocol.goal
    assert on_paths == states


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_no_instruction_is_given_twice_on_any_path(protocol: Protocol) -> None:
    for path in protocol.paths():
        assert len(path) == len(set(path))


@pytest.mark.parametrize("protocol", BACKUPS, ids=lambda p: p.name)
def test_whatever_was_begun_from_prepare_to_resume_the_vm_is_resumed_first_of_all(protocol: Protocol) -> None:
    for path in protocol.paths():
        after_prepare = path.index(Instruction.PREPARE) + 1
        for length in range(after_prepare, path.index(Instruction.RESUME) + 2):
            assert protocol.to_undo(path[:length])[0] is Compensation.RESUME_VM


@pytest.mark.parametrize("protocol", BACKUPS, ids=lambda p: p.name)
def test_disks_and_memory_are_fixed_between_pause_and_resume_in_either_order(protocol: Protocol) -> None:
    orders = set()
    for path in protocol.paths():
        window = path[path.index(Instruction.PAUSE) : path.index(Instruction.RESUME) + 1]
        assert set(window) == protocol.window
        orders.add(window[1:3])
    assert len(orders) == 2


@pytest.mark.parametrize("protocol", [BACKUP_LIVE_FROZEN, BACKUP_CONSISTENT_FROZEN], ids=lambda p: p.name)
def test_whatever_was_begun_while_disks_are_frozen_they_are_thawed_before_anything_is_removed(
    protocol: Protocol,
) -> None:
    for path in protocol.paths():
        for length in range(path.index(Instruction.PREPARE) + 1, len(path) + 1):
            undone = protocol.to_undo(path[:length])
            removing = [undone.index(each) for each in REMOVING if each in undone]
            assert undone.index(Compensation.THAW_DISKS) < min(removing)
        assert path.index(Instruction.RESUME) < path.index(Instruction.SNAPSHOT) < path.index(Instruction.THAW)


@pytest.mark.parametrize(
    "protocol", [BACKUP_CONSISTENT, BACKUP_CONSISTENT_FROZEN, CONSOLIDATE, VERIFY_BOOT], ids=lambda p: p.name
)
def test_a_duplicate_that_is_to_be_consolidated_runs_only_on_its_own_disks_with_its_network_cut(
    protocol: Protocol,
) -> None:
    for path in protocol.paths():
        run = path.index(Instruction.RESUME_DUPLICATE)
        assert path.index(Instruction.SWITCH_DISKS) < run
        assert path.index(Instruction.CUT_NETWORK) < run
        assert Instruction.CUT_NETWORK not in protocol.conditions


def test_a_restored_vm_runs_only_on_its_own_disks() -> None:
    for path in RESTORE.paths():
        assert path.index(Instruction.SWITCH_DISKS) < path.index(Instruction.RESUME_DUPLICATE)


def test_a_duplicate_takes_a_vms_place_only_after_that_is_fenced_and_is_never_removed() -> None:
    for path in FAILOVER.paths():
        assert path[0] is Instruction.FENCE
        for length in range(len(path) + 1):
            undone = set(FAILOVER.to_undo(path[:length]))
            assert not undone & {
                Compensation.DISCARD_DUPLICATE,
                Compensation.REMOVE_DISKS,
                Compensation.DESTROY_LOADED,
            }


def test_every_compensation_has_its_place_in_the_order() -> None:
    assert set(COMPENSATION_ORDER) == set(Compensation)


def test_what_is_not_in_the_table_is_not_allowed() -> None:
    with pytest.raises(KeyError):
        BACKUP_LIVE.after(State.READY, Instruction.PAUSE)


def test_the_diagrams_in_the_docs_are_those_of_the_tables() -> None:
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_protocols.py"), "--check"], check=True)
