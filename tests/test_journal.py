"""The journal and the VM table: durable before the world changes, readable by another process after a crash."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmsnap.database import Database
from vmsnap.errors import AlreadyExists, Busy, UnknownVm, VmsnapError
from vmsnap.host import HostFolders, boot_id, process_start
from vmsnap.journal import KEPT_SECONDS, Journal
from vmsnap.locks import vm_lock
from vmsnap.vmtable import DiskRow, VmRow, VmTable


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "vmsnap.db")
    yield made
    made.close()


def test_the_vm_table_keeps_the_columns_of_the_patent(database: Database) -> None:
    table = VmTable(database)
    disks = (DiskRow("/dev/sd001", "iscsi://host/iqn.2009-12.com.example:001/1", "iscsi"), DiskRow("sd002", "/x", None))
    row = VmRow("vm001", "simulated", {"socket": "/s"}, disks, "executing", False)
    table.add(row)
    assert table.get("vm001") == row
    table.set_state("vm001", "stopped", resume_flag=True)
    assert (table.get("vm001").state, table.get("vm001").resume_flag) == ("stopped", True)
    table.add(VmRow("bk001", "simulated", {}, disks[:1], kind="duplicate", duplicate_of="vm001"))
    assert [(r.vm, r.kind, r.duplicate_of) for r in table.rows()] == [
        ("bk001", "duplicate", "vm001"),
        ("vm001", "working", None),
    ]
    with pytest.raises(AlreadyExists):
        table.add(row)
    table.remove("vm001")
    table.remove("vm001")
    with pytest.raises(UnknownVm):
        table.get("vm001")


def test_an_operation_of_a_killed_process_is_found_with_all_that_it_was_about_to_do(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from vmsnap.database import Database
from vmsnap.journal import Journal
from vmsnap.vmtable import VmRow, VmTable
database = Database(Path(sys.argv[1]))
VmTable(database).add(VmRow("vm001", "simulated", {}, (), "executing"))
operation = Journal(database).begin("backup, mode live", "vm001", "simulated", {"socket": "/s"})
operation.must_execute(True)
operation.will_make("snapshot", "file", '{"a":1}')
operation.is_gone(operation.will_make("file", "", '"x"'))
operation.begun("prepare"); operation.ended("prepare", "done")
operation.open_window(["pause", "snapshot", "duplicate", "resume"], "vm001", executing=True)
operation.begun("pause"); operation.ended("pause", "done")
os.kill(os.getpid(), 9)
"""
    path = tmp_path / "vmsnap.db"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    database = Database(path)
    journal = Journal(database)
    (found,) = journal.unfinished()
    assert (found.vm, found.executing, found.outcome, found.worker_alive()) == ("vm001", True, None, False)
    operation = journal.open_operation(found.operation)
    entries = [(entry.instruction, entry.status) for entry in operation.entries()]
    # The pause ended in memory only: after a crash inside the window all of it counts as begun.
    assert entries == [("prepare", "done"), *[(i, "begun") for i in ("pause", "snapshot", "duplicate", "resume")]]
    assert [(r.kind, r.driver, r.data) for r in operation.resources()] == [("snapshot", "file", '{"a":1}')]
    row = VmTable(database).get("vm001")
    assert (row.state, row.resume_flag) == ("stopped", True)
    operation.end("recovered")
    assert journal.unfinished() == [journal.operations()[0]], "its snapshot is still there"
    operation.must_execute(False)
    operation.hand_to_user(VmRow("vm002", "simulated", {}, ()))
    assert journal.unfinished() == []
    database.close()


def test_a_closed_window_says_what_was_not_reached(database: Database) -> None:
    operation = Journal(database).begin("backup, mode live", "vm001", "simulated", {})
    operation.open_window(["pause", "snapshot"], "vm001", executing=False)
    operation.begun("pause")
    operation.ended("pause", "failed", "why")
    operation.close_window()
    operation.close_window()
    assert [(e.instruction, e.status, e.message) for e in operation.entries()] == [
        ("pause", "failed", "why"),
        ("snapshot", "not reached", ""),
    ]


def test_operations_that_ended_long_ago_and_left_nothing_are_forgotten(database: Database) -> None:
    journal = Journal(database)
    old, left, recent = (journal.begin("restore", "vm001", "simulated", {}) for _ in range(3))
    left.will_make("file", "", '"x"')
    for operation in (old, left, recent):
        operation.end("done")
    with database.transaction() as db:
        db.execute(
            "UPDATE operation SET ended_ns = ended_ns - ? WHERE operation != ?",
            ((KEPT_SECONDS + 1) * 10**9, recent.name),
        )
    new = journal.begin("restore", "vm001", "simulated", {})
    assert {row.operation for row in journal.operations()} == {left.name, recent.name, new.name}


def test_a_damaged_database_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "vmsnap.db"
    path.write_bytes(os.urandom(8192))
    with pytest.raises(VmsnapError, match=r"state database .* cannot be used") as error:
        Database(path)
    assert "\n" not in str(error.value)


def test_a_database_of_a_newer_vmsnap_is_left_alone(database: Database) -> None:
    with database.transaction() as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(VmsnapError, match="version 99"):
        Database(database.path)


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vmsnap.locks import vm_lock\n"
        "with vm_lock(Path(sys.argv[1]), 'vm001', 'backup'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if holder.stdout is None or holder.stdout.readline() != b"held\n":
        raise AssertionError("the lock was not taken")
    with pytest.raises(Busy, match=f"backup by process {holder.pid} since"), vm_lock(tmp_path, "vm001", "restore"):
        pass
    holder.kill()
    holder.wait()
    with vm_lock(tmp_path, "vm001", "restore"):
        pass


def test_a_holder_that_has_not_said_yet_who_it_is_is_waited_for(tmp_path: Path) -> None:
    with vm_lock(tmp_path, "vm001", "recover"):
        pass
    (path,) = (tmp_path / "locks").iterdir()
    assert path.read_bytes() == b"", "a note does not outlive its holder, to be taken for the next one's"
    with path.open("rb") as silent:
        fcntl.flock(silent, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(silent, fcntl.LOCK_UN)).start()
        with vm_lock(tmp_path, "vm001", "backup"):
            assert b"backup" in path.read_bytes()


def test_folders_are_closed_to_others_and_each_state_folder_has_a_memory_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir(mode=0o755)
    one, two = HostFolders.find(tmp_path / "one"), HostFolders.find(tmp_path / "two")
    for folder in (one.state_dir, one.memory_dir, two.state_dir, two.memory_dir):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert one.memory_dir != two.memory_dir
    one.memory_dir.rmdir()
    two.memory_dir.rmdir()


def test_a_process_is_named_by_pid_and_start_and_a_boot_by_its_id() -> None:
    assert process_start(os.getpid()) is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert process_start(gone.pid) is None
    assert len(boot_id()) == 36


def test_what_need_not_be_durable_is_seen_at_once_and_changes_nothing_for_the_next(tmp_path: Path) -> None:
    database, other = Database(tmp_path / "vmsnap.db"), Database(tmp_path / "vmsnap.db")

    def is_full() -> bool:
        return bool(database.rows("PRAGMA synchronous")[0][0] == 2)

    row = ("file:///r", "id", "none")
    with database.transaction(durable=False) as db:
        db.execute("INSERT INTO repository VALUES (?, ?, ?)", row)
        assert not is_full()
    assert is_full() and len(other.rows("SELECT * FROM repository")) == 1
    with pytest.raises(VmsnapError, match="cannot be written"), database.transaction(durable=False) as db:
        db.execute("INSERT INTO repository VALUES (?, ?, ?)", row)
    with pytest.raises(KeyError), database.transaction(durable=False) as db:
        db.execute("DELETE FROM repository")
        raise KeyError
    assert is_full() and len(other.rows("SELECT * FROM repository")) == 1
    database.close()
    other.close()
