"""Whoever puts an unencrypted repository in the place of an encrypted one is not given the next backup."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.world import World
from vmsnap.database import SCHEMA_VERSION, Database
from vmsnap.errors import RepositoryError
from vmsnap.knownrepositories import KnownRepositories
from vmsnap.places import create_repository


def test_an_unencrypted_repository_in_the_place_of_an_encrypted_one_is_refused(world: World) -> None:
    shutil.rmtree(world.url)
    encrypted = create_repository(world.url, "correct horse")
    with world.controller() as controller:
        controller.backup("vm001", encrypted)
    shutil.rmtree(world.url)
    plain = create_repository(world.url)
    with world.controller() as controller:
        with pytest.raises(RepositoryError, match=r"was encrypted .* in the clear"):
            controller.backup("vm001", plain)
        assert plain.list() == []
        assert world.status()["state"] == "executing"
        made = controller.backup("vm001", plain, accept_unencrypted=True)
        assert [manifest.backup for manifest in plain.list()] == [made.backup]
        # It was accepted once for all.
        controller.backup("vm001", plain)


def test_another_encrypted_repository_or_another_place_is_no_matter(tmp_path: Path) -> None:
    known = KnownRepositories(Database(tmp_path / "db"))
    known.note("/a", "1" * 32, "aes256-gcm")
    known.expect("/a", "2" * 32, "aes256-gcm")
    known.expect("/b", "3" * 32, "none")
    with pytest.raises(RepositoryError):
        known.expect("/a", "3" * 32, "none")
    known.note("/a", "3" * 32, "none")
    known.expect("/a", "3" * 32, "none")


def test_a_database_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "db"
    Database(path).close()
    with sqlite3.connect(path) as old:
        later = ("held", "repository", "schedule", "schedule_state", "job", "notice", "token", "catalogue", "own_disk")
        for table in (*later, "counter", "vm_tag"):
            old.execute(f"DROP TABLE {table}")
        for trigger in ("operation_counted", "failure_counted", "deed_counted"):
            old.execute(f"DROP TRIGGER {trigger}")
        old.execute("DROP INDEX operation_by_vm")
        old.execute("ALTER TABLE operation DROP COLUMN backup")
        old.execute("PRAGMA user_version = 1")
    old.close()
    database = Database(path)
    KnownRepositories(database).note("/a", "1" * 32, "none")
    assert database.rows("PRAGMA user_version")[0][0] == SCHEMA_VERSION
    database.close()
