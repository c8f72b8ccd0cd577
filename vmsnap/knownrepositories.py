"""The repositories that this host has stored backups in, so that nobody can put an unencrypted one in the place of an
encrypted one and be given the next backup in the clear.
"""

from __future__ import annotations

from vmsnap.database import Database
from vmsnap.errors import RepositoryError


class KnownRepositories:
    """What is known, in the host's database. Each change is one durable transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def expect(self, url: str, repository_id: str, encryption: str) -> None:
        """Refuse an unencrypted repository where there was an encrypted one.

        :raises RepositoryError: that is so
        """
        for row in self._database.rows("SELECT id, encryption FROM repository WHERE url = ?", url):
            if row["encryption"] != "none" and encryption == "none":
                raise RepositoryError(
                    f"the repository at {url} was encrypted ({row['id']}), and now an unencrypted one is there"
                    f" ({repository_id}): the backup would lie there in the clear",
                    cure="find out who put it there; if it is meant, give --accept-unencrypted",
                )

    def note(self, url: str, repository_id: str, encryption: str) -> None:
        """Remember what is there now; idempotent."""
        known = self._database.rows("SELECT id, encryption FROM repository WHERE url = ?", url)
        if [tuple(row) for row in known] == [(repository_id, encryption)]:
            return
        with self._database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO repository VALUES (?, ?, ?)", (url, repository_id, encryption))
