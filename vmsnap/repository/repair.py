"""Repairs a repository: saves all that can be saved, and notes in each backup what it has lost.

New objects are durable before old ones go, so that a repair that is killed leaves nothing worse than it was:

1. what is intact in damaged packs is copied into new ones, and index objects that list only what is whole are put;
2. index objects that are damaged, or list anything else, are deleted;
3. the manifests of backups that have lost something, or are whole again, are put once more, under the same keys;
4. damaged packs are condemned as garbage collection does it, and deleted when nobody can be reading them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vmsnap.errors import Busy, DamageFound, NewerFormat, ObjectNotFound, ObjectRetained, RepositoryError
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.findings import DAMAGE, NOTE, Findings, RepairReport, Touched, object_in
from vmsnap.repository.format import manifest_key, pack_key
from vmsnap.repository.garbage import Garbage, list_garbage, put_awaited, put_garbage
from vmsnap.repository.index import ChunkIndex, IndexedPack
from vmsnap.repository.loss import joined
from vmsnap.repository.manifest import LostRange, Manifest, with_lost
from vmsnap.repository.repack import IndexWriter, copy_blobs
from vmsnap.repository.salvage import Salvage
from vmsnap.repository.sessions import Session, collectors, delete_session, list_sessions
from vmsnap.repository.smallobjects import check_small_objects
from vmsnap.repository.walk import LossWalk

if TYPE_CHECKING:
    from vmsnap.repository.check import Progress
    from vmsnap.repository.packstate import PackState
    from vmsnap.repository.repository import Repository


def repair_repository(
    repository: Repository, *, dry_run: bool, forget_damaged: bool, progress: Progress | None
) -> RepairReport:
    """See `Repository.repair`."""
    with repository.session("read" if dry_run else "gc", "repair") as session:
        if not dry_run:
            _refuse_others(repository, session)
        return _Repair(repository, dry_run).run(session, forget_damaged, progress)


def _refuse_others(repository: Repository, session: Session) -> None:
    """Two at once would take the other's new objects for strays.

    :raises Busy: somebody else collects garbage or repairs
    """
    for other in collectors(repository.storage, repository.vault, session.key):
        raise Busy(f"{other.description} is at work", cure="try again when it has ended")


class _Repair:
    def __init__(self, repository: Repository, dry_run: bool) -> None:
        self._repository = repository
        self._storage = repository.storage
        self._vault = repository.vault
        self._dry_run = dry_run
        self._findings = Findings()
        self._actions: list[str] = []

    def run(self, session: Session, forget_damaged: bool, progress: Progress | None) -> RepairReport:
        unreadable: list[DamageFound] = []
        manifests = self._repository.list(unreadable.append)
        damaged = self._damaged_manifests(unreadable)
        check_small_objects(self._repository, self._findings)
        self._salvage = salvage = Salvage(self._repository, self._findings, progress)
        rescued = salvage.rescued
        # What is newer than this vmsnap may need anything.
        used = set(salvage.unlisted) if len(damaged) < len(unreadable) else set[bytes]()
        marks = self._look_for_losses(manifests, rescued, used)
        adopted = [pack for pack in salvage.unlisted.values() if pack.id in used]
        broken = [state for state in salvage.damaged.values() if salvage.is_listed(state.id) or state.id in used]
        # What is condemned may be deleted while somebody still relies on the copy in a damaged pack.
        self._copy(broken, salvage.whole.without(self._condemned()).extended(adopted))
        self._rewrite_index(adopted, session)
        whole_again = self._mark(manifests, marks)
        self._remove_damaged_condemnations()
        waits_for = self._remove_packs([state.id for state in broken], session)
        if forget_damaged:
            self._forget(damaged)
        return RepairReport(
            dry_run=self._dry_run,
            backups=len(manifests) + len(unreadable),
            packs=len(salvage.sizes),
            read_bytes=salvage.read_bytes,
            findings=self._findings.all(),
            actions=tuple(self._actions),
            lost=_touched(manifests, marks),
            unreadable=tuple(key.rpartition("/")[2] for key in damaged),
            whole_again=whole_again,
            waits_for=waits_for,
        )

    # -- looking

    def _damaged_manifests(self, unreadable: Sequence[DamageFound]) -> list[str]:
        keys = []
        for damage in unreadable:
            newer = isinstance(damage, NewerFormat)
            key = object_in(damage.message)
            self._findings.add(key, str(damage), severity=NOTE if newer else DAMAGE)
            if not newer:
                keys.append(key)
        return keys

    def _look_for_losses(
        self, manifests: Sequence[Manifest], rescued: ChunkIndex, used: set[bytes]
    ) -> dict[str, tuple[LostRange, ...]]:
        """What each backup has lost; adds to `used` the packs that are needed, where not all are listed already."""
        odd = bool(self._salvage.unlisted or self._salvage.damaged)

        def use(ids: bytes) -> None:
            used.update(rescued.packs_of(ids))

        walk = LossWalk(BlobReader(self._storage, self._vault, rescued), rescued, use if odd else None)
        marks = {}
        for manifest in manifests:
            lost: list[LostRange] = []
            for part, image in manifest.images:
                ranges = []
                for loss in walk.losses(image):
                    if isinstance(loss.cause, RepositoryError):
                        message = f"{part} of {manifest.backup} cannot be looked at: {loss.cause}"
                        self._findings.add(manifest_key(manifest.backup), message, severity=NOTE)
                        used.update(self._salvage.unlisted)
                    else:
                        ranges.append((loss.offset, loss.length))
                lost += joined(part, ranges)
            marks[manifest.backup] = tuple(lost)
        return marks

    def _condemned(self) -> set[bytes]:
        found = list_garbage(self._storage, self._vault).values()
        return set[bytes]().union(*(garbage.packs for garbage in found if isinstance(garbage, Garbage)))

    # -- doing

    def _copy(self, packs: Sequence[PackState], kept: ChunkIndex) -> None:
        """Copy what is intact in damaged packs, and lies nowhere else, into new packs that are listed."""
        halves = ChunkIndex(IndexedPack(state.id, state.size_bytes or 0, state.intact) for state in packs)
        ids = halves.ids_at(np.arange(len(halves)))
        # Of two copies one is enough.
        rows = np.unique(halves.rows(ids)[~kept.contained(ids)])
        for state in packs:
            self._act(f"{state.key} is damaged: what is intact in it is kept elsewhere")
        if len(rows):
            self._act(f"{len(rows)} intact blobs of damaged packs are copied")
            if not self._dry_run:
                copy_blobs(self._storage, self._vault, halves, rows)

    def _rewrite_index(self, adopted: Sequence[IndexedPack], session: Session) -> None:
        """Let the index list what is whole, and nothing else: new objects first, then the old ones go."""
        outdated: list[str] = []
        writer = IndexWriter(self._storage, self._vault)

        def add(packs: Iterable[IndexedPack]) -> None:
            for pack in () if self._dry_run else packs:
                writer.add(pack)

        for key, packs in self._salvage.index_objects():
            kept = self._salvage.kept(packs)
            if len(kept) < len(packs):
                outdated.append(key)
                self._act(f"{key} lists packs that are not as it says: it is written anew")
                add(kept)
        for pack in adopted:
            self._act(f"{pack_key(pack.id)} is needed and listed nowhere: it is listed again")
        add(adopted)
        add(self._salvage.wrongly_listed.values())
        writer.flush()
        for key in self._salvage.damaged_indexes:
            self._act(f"{key} is damaged: it is removed")
        if not self._dry_run:
            session.require()
            for key in [*outdated, *self._salvage.damaged_indexes]:
                self._storage.delete(key)

    def _mark(self, manifests: Sequence[Manifest], marks: dict[str, tuple[LostRange, ...]]) -> tuple[str, ...]:
        """Note in the manifests what is lost; returns the backups that are whole again."""
        whole_again = []
        for manifest in manifests:
            lost = marks[manifest.backup]
            if lost == manifest.lost:
                continue
            key = manifest_key(manifest.backup)
            try:
                data = self._storage.get(key)
            except ObjectNotFound:  # somebody removed the backup meanwhile
                continue
            self._put(key, with_lost(self._vault, key, data, lost))
            if lost:
                self._act(f"{key} notes that {sum(each.length for each in lost)} bytes are lost")
            else:
                self._act(f"{key} notes no loss any more: the backup is whole again")
                whole_again.append(manifest.backup)
        return tuple(whole_again)

    def _remove_damaged_condemnations(self) -> None:
        """What they condemn is garbage still, and is found again."""
        for key, garbage in list_garbage(self._storage, self._vault).items():
            if isinstance(garbage, DamageFound):
                self._act(f"{key} is damaged: it is removed, and garbage collection finds its packs again")
                if not self._dry_run:
                    self._storage.delete(key)

    def _remove_packs(self, packs: Sequence[bytes], session: Session) -> tuple[str, ...]:
        """Delete damaged packs, of which the index names nothing any more; returns for whom that has to wait."""
        if not packs or self._dry_run:
            return ()
        garbage = put_garbage(self._storage, self._vault, packs)
        others = [each for each in list_sessions(self._storage, self._vault) if each.key != session.key]
        for other in others:
            if other.dead:
                # Before anything goes, so that its owner, should it live after all, does not rely on it.
                delete_session(self._storage, other.key)
        living = [other for other in others if not other.dead]
        garbage = put_awaited(self._storage, self._vault, garbage, [other.key for other in living])
        if living:
            return tuple(other.description for other in living)
        session.require()
        for pack in packs:
            self._delete(pack_key(pack))
        self._storage.delete(garbage.key)
        return ()

    def _forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._act(f"{key} cannot be read: it is deleted")
            if not self._dry_run:
                self._delete(key)

    def _delete(self, key: str) -> None:
        try:
            self._storage.delete(key)
        except ObjectRetained as e:
            self._act(f"{e.message}: it stays until garbage is collected after that")

    def _put(self, key: str, data: bytes) -> None:
        if not self._dry_run:
            self._storage.put(key, data)

    def _act(self, line: str) -> None:
        self._actions.append(line)


def _touched(manifests: Sequence[Manifest], marks: dict[str, tuple[LostRange, ...]]) -> tuple[Touched, ...]:
    lost = Findings()
    for manifest in manifests:
        for each in marks[manifest.backup]:
            lost.add("", "lost", (manifest.backup, each.part), each.offset, each.length)
    return tuple(touch for finding in lost.all() for touch in finding.touches)
