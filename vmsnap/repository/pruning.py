"""Removes backups: by a retention policy, or by name. Their data stays until garbage collection."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vmsnap.errors import DamageFound, ObjectNotFound, ObjectRetained, StorageError, UnknownBackup, UsageError
from vmsnap.repository.format import manifest_key
from vmsnap.repository.retaining import locked
from vmsnap.repository.retention import RetentionPolicy, Verdict, apply

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository


@dataclass(frozen=True)
class PruneReport:
    """What a prune has done, or would do: `verdicts` of all backups that it looked at, by VM, the oldest first.

    `unread` are the manifests that are damaged or of a newer format: they were left alone.
    """

    dry_run: bool
    verdicts: tuple[Verdict, ...]
    unread: tuple[DamageFound, ...] = ()

    @property
    def kept(self) -> tuple[Verdict, ...]:
        """The backups that stay."""
        return tuple(verdict for verdict in self.verdicts if verdict.kept)

    @property
    def removed(self) -> tuple[Verdict, ...]:
        """The backups that are gone, or in a dry run would be."""
        return tuple(verdict for verdict in self.verdicts if not verdict.kept)


def prune_repository(
    repository: Repository,
    policy: RetentionPolicy,
    *,
    vm: str | None,
    tags: Collection[str],
    dry_run: bool,
    now: datetime | None,
) -> PruneReport:
    """See `Repository.prune`."""
    unread: list[DamageFound] = []
    wanted = frozenset(tags)
    backups = [
        manifest
        for manifest in repository.list(unread.append)
        if vm in (None, manifest.vm) and (not wanted or wanted.intersection(manifest.tags))
    ]
    verdicts = apply(policy, backups, now or datetime.now(UTC))
    doomed = [manifest_key(verdict.backup) for verdict in verdicts if not verdict.kept]
    until = locked(repository.storage, doomed)
    verdicts = tuple(_unless_locked(verdict, until.get(manifest_key(verdict.backup))) for verdict in verdicts)
    report = PruneReport(dry_run, verdicts, tuple(unread))
    if not dry_run:
        _forget_each(repository, [verdict.backup for verdict in report.removed])
    return report


def _unless_locked(verdict: Verdict, until: datetime | None) -> Verdict:
    """The verdict, where the storage lets it be carried out."""
    if verdict.kept or until is None:
        return verdict
    return replace(verdict, reasons=(f"locked until {until:%Y-%m-%d %H:%M} UTC",))


def forget_backups(repository: Repository, backups: Sequence[str]) -> None:
    """Remove backups by their whole ids; a damaged one too. Each is removed atomically, one after the other.

    :raises UnknownBackup: one of them is not there; none was removed
    :raises ObjectRetained: the storage keeps one of them until a time; the others were removed, says a note
    :raises StorageError: the storage failed; a note says how many were removed
    """
    for backup in backups:
        try:
            repository.storage.stat(manifest_key(backup))
        except (ObjectNotFound, UsageError) as e:
            raise UnknownBackup(f"there is no backup {backup!r}", cure="vmsnap list shows them") from e
    _forget_each(repository, backups)


def _forget_each(repository: Repository, backups: Sequence[str]) -> None:
    removed, retained = 0, None
    for backup in backups:
        try:
            repository.forget(backup)
            removed += 1
        except UnknownBackup:
            removed += 1  # somebody else has removed it meanwhile
        except ObjectRetained as e:
            retained = retained or e
        except StorageError as e:
            e.add_note(f"{removed} of {len(backups)} backups were removed before that")
            raise
    if retained is not None:
        retained.add_note(f"{removed} of {len(backups)} backups were removed")
        raise retained
