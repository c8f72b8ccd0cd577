"""Garbage collection: frees the room of what no backup needs, beside running backups and restores.

In two phases. The first one condemns packs, by an object that every later writer reads. The second one deletes them,
when all who were at it before have ended, and only what no backup needs then. docs/repository-format.md says why that
is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vmsnap.errors import Busy, DamageFound
from vmsnap.repository import upload
from vmsnap.repository.format import BlobKind, pack_key, pack_of_key
from vmsnap.repository.garbage import Garbage, list_garbage, put_awaited, put_garbage
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.marking import PhaseProgress, Stock, take_stock
from vmsnap.repository.repack import copy_blobs
from vmsnap.repository.retaining import locked
from vmsnap.repository.sessions import (
    DEAD_AFTER_SECONDS,
    Session,
    SessionInfo,
    delete_session,
    delete_stray_heartbeats,
    list_sessions,
)
from vmsnap.repository.sweeping import carry_out, plan_sweep, rewrite_index

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository

# A pack of which so much is garbage is written anew without it.
_GARBAGE_SHARE = 0.2
# Packs below this share of a full one are put together when there are so many.
_SMALL_SHARE = 0.25
_SMALL_PACKS = 8


@dataclass(frozen=True)
class GcReport:
    """What garbage collection has done, or with `dry_run` what it would do.

    Packs that were `deleted` are gone, those `waiting` are condemned and are deleted by a later run, when the sessions
    in `waiting_for` (a line each) have ended. Of the packs that were `repacked`, `repacked_bytes` were needed and
    copied into new packs; they count as deleted or waiting too. `live_bytes` is what the `backups` need.
    `dead_sessions` (a line each) were removed. Packs that are `locked` are garbage, at least in part, and the storage
    lets nobody delete them yet; they stay listed, and new backups may use what is in them.
    """

    dry_run: bool
    backups: int
    live_bytes: int
    packs_deleted: int = 0
    deleted_bytes: int = 0
    packs_repacked: int = 0
    repacked_bytes: int = 0
    packs_waiting: int = 0
    waiting_bytes: int = 0
    waiting_for: tuple[str, ...] = ()
    packs_locked: int = 0
    locked_bytes: int = 0
    index_objects_rewritten: int = 0
    dead_sessions: tuple[str, ...] = ()


def collect_garbage(
    repository: Repository,
    progress: PhaseProgress | None = None,
    dead_after_seconds: float = DEAD_AFTER_SECONDS,
    dry_run: bool = False,
) -> GcReport:
    """See `Repository.gc`."""
    with repository.session("read" if dry_run else "gc", "garbage collection") as session:
        return _Collection(repository, session, progress, dead_after_seconds, dry_run).run()


class _Collection:
    """One run."""

    def __init__(
        self,
        repository: Repository,
        session: Session,
        progress: PhaseProgress | None,
        dead_after_seconds: float,
        dry_run: bool,
    ) -> None:
        self.repository = repository
        self.storage = repository.storage
        self.vault = repository.vault
        self.session = session
        self.progress = progress
        self.dead_after_seconds = dead_after_seconds
        self.dry_run = dry_run
        self.loader = IndexLoader(repository.storage, repository.vault)
        self.waiting: list[Garbage] = []
        self.dead: dict[str, str] = {}
        self.locked_bytes: dict[bytes, int] = {}
        self.packs_deleted = self.deleted_bytes = self.rewritten = 0

    def run(self) -> GcReport:
        living = self.living()
        others = [other for other in living if other.record and other.record.kind == "gc"]
        if others:
            raise Busy(f"another garbage collection is at work: {others[0].description}", cure="try again later")
        ready = self.pending(living)
        stock = take_stock(self.repository, self.loader, self.condemned(ready), progress=self.progress)
        overdue: frozenset[bytes] = frozenset()
        if ready:
            stock, overdue = self.sweep(stock, ready)
        doomed, to_repack, leftovers = self.candidates(stock, overdue, living)
        if to_repack and not self.dry_run:
            self.repack(stock, to_repack)
        repacked_bytes = sum(bytes_ for pack, bytes_ in stock.needed_bytes_by_pack().items() if pack in to_repack)
        if doomed or to_repack or leftovers:
            stock, living = self.condemn(stock, doomed | to_repack, leftovers, living)
        if not self.dry_run:
            self.rewritten += rewrite_index(self.storage, self.vault, self.loader)
        return self.report(stock, living, len(to_repack), repacked_bytes)

    def living(self) -> Sequence[SessionInfo]:
        """The sessions of others that are not dead; dead ones are removed, and can rely on nothing any more."""
        living = []
        for found in list_sessions(self.storage, self.vault, self.dead_after_seconds):
            if found.key == self.session.key:
                continue
            if not found.dead:
                living.append(found)
                continue
            self.dead[found.key] = f"{found.description}: {found.dead}"
            if not self.dry_run:
                delete_session(self.storage, found.key)
        if not self.dry_run:
            delete_stray_heartbeats(self.storage)
        return living

    def pending(self, living: Sequence[SessionInfo]) -> list[Garbage]:
        """What earlier runs have condemned: returns that for which nobody has to wait any more, and notes the rest."""
        keys = [other.key for other in living]
        ready: list[Garbage] = []
        for key, garbage in list_garbage(self.storage, self.vault).items():
            if isinstance(garbage, DamageFound):
                # What it condemned is as good as before, or listed nowhere any more.
                if not self.dry_run:
                    self.storage.delete(key)
                continue
            if garbage.awaits is None:  # killed before it knew; all who can matter are alive now, or have ended
                garbage = self.awaiting(garbage, keys)
            (ready if garbage.ready(keys) else self.waiting).append(garbage)
        return ready

    def awaiting(self, garbage: Garbage, keys: Sequence[str]) -> Garbage:
        if self.dry_run:
            return replace(garbage, awaits=frozenset(keys))
        return put_awaited(self.storage, self.vault, garbage, keys)

    def condemned(self, ready: Sequence[Garbage] = ()) -> frozenset[bytes]:
        return frozenset[bytes]().union(*(garbage.packs for garbage in (*self.waiting, *ready)))

    def sweep(self, stock: Stock, ready: Sequence[Garbage]) -> tuple[Stock, frozenset[bytes]]:
        """Delete; returns the stock after that, and the leftovers that are to be condemned now."""
        sweep = plan_sweep(stock, ready)
        self.packs_deleted += len(sweep.doomed & stock.sizes.keys())
        self.deleted_bytes += sweep.deleted_bytes
        if self.dry_run:
            return _without(stock, sweep.doomed), sweep.overdue
        self.rewritten += carry_out(self.storage, self.vault, self.loader, stock, sweep, self.session)
        after = take_stock(self.repository, self.loader, self.condemned(), stock, self.progress)
        return after, sweep.overdue

    def candidates(
        self, stock: Stock, overdue: frozenset[bytes], living: Sequence[SessionInfo]
    ) -> tuple[frozenset[bytes], frozenset[bytes], frozenset[bytes]]:
        """The packs that are to be deleted as they are, those to be written anew without their garbage, and those that
        are to be looked at again when those who write now have ended.
        """
        known = self.condemned()
        needed, stored = stock.needed_bytes_by_pack(), stock.index.sealed_bytes_by_pack()
        doomed = {pack for pack in stock.listed if pack not in needed}
        sparse = {
            pack
            for pack, needed_bytes in needed.items()
            if needed_bytes <= (1 - _GARBAGE_SHARE) * stored[pack] or stock.sizes[pack] != stock.listed[pack]
        } - known
        for kind in BlobKind:
            small_bytes = _SMALL_SHARE * upload.PACK_BYTES_OF[kind]
            of_kind = (stock.index.packs_with(kind) & needed.keys()) - known
            small = {pack for pack in of_kind if stock.sizes[pack] < small_bytes}
            if len(small) >= _SMALL_PACKS:
                sparse |= small
        unlisted = stock.sizes.keys() - stock.listed.keys()
        if any(other.record is None or other.record.kind == "write" for other in living):
            # They may be listed soon. To condemn them would make others store anew what is in them.
            suspected = frozenset[bytes]().union(*(garbage.leftovers for garbage in self.waiting))
            leftovers = frozenset(unlisted - overdue - suspected - known)
            unlisted = unlisted & overdue
        else:
            leftovers = frozenset()
        unneeded = (doomed | unlisted) - known
        kept = locked(self.storage, [pack_key(pack) for pack in sorted((unneeded | sparse) & stock.sizes.keys())])
        self.locked_bytes = {pack: stock.sizes[pack] for key in kept if (pack := pack_of_key(key))}
        return frozenset(unneeded - self.locked_bytes.keys()), frozenset(sparse - self.locked_bytes.keys()), leftovers

    def repack(self, stock: Stock, packs: frozenset[bytes]) -> None:
        """Copy what is needed of these packs to others."""
        needed = stock.needed_bytes_by_pack()
        total = sum(needed[pack] for pack in packs)

        def advance(done_bytes: int) -> None:
            if self.progress:
                self.progress("repacking", done_bytes, total)

        rows = stock.index.rows_in(packs, stock.needed)
        copy_blobs(self.storage, self.vault, stock.index, rows, advance)

    def condemn(
        self, stock: Stock, packs: frozenset[bytes], leftovers: frozenset[bytes], living: Sequence[SessionInfo]
    ) -> tuple[Stock, Sequence[SessionInfo]]:
        """Condemn packs, and delete them at once where nobody is there for whom to wait. Returns stock and living
        sessions after that.
        """
        if self.dry_run:
            garbage = Garbage("", packs, leftovers, frozenset(other.key for other in living))
            if living:
                self.waiting.append(garbage)
            else:
                there = packs & stock.sizes.keys()
                self.packs_deleted += len(there)
                self.deleted_bytes += sum(stock.sizes[pack] for pack in there)
            return stock, living
        garbage = put_garbage(self.storage, self.vault, packs, leftovers)
        # In this order: who begins after the put knows what is condemned, and all others are seen here.
        living = self.living()
        if living:
            self.waiting.append(put_awaited(self.storage, self.vault, garbage, [other.key for other in living]))
            return stock, living
        # Those who ended meanwhile may have left a backup that relies on it.
        stock = take_stock(self.repository, self.loader, self.condemned([garbage]), stock, self.progress)
        stock, _ = self.sweep(stock, [garbage])
        return stock, living

    def report(self, stock: Stock, living: Sequence[SessionInfo], packs_repacked: int, repacked_bytes: int) -> GcReport:
        waiting = frozenset[bytes]().union(*(garbage.packs | garbage.leftovers for garbage in self.waiting))
        there = waiting & stock.sizes.keys()
        awaited = frozenset[str]().union(*(garbage.awaits or frozenset() for garbage in self.waiting))
        return GcReport(
            dry_run=self.dry_run,
            backups=len(stock.backups),
            live_bytes=sum(stock.needed_bytes_by_pack().values()),
            packs_deleted=self.packs_deleted,
            deleted_bytes=self.deleted_bytes,
            packs_repacked=packs_repacked,
            repacked_bytes=repacked_bytes,
            packs_waiting=len(there),
            waiting_bytes=sum(stock.sizes[pack] for pack in there),
            waiting_for=tuple(other.description for other in living if other.key in awaited),
            packs_locked=len(self.locked_bytes),
            locked_bytes=sum(self.locked_bytes.values()),
            index_objects_rewritten=self.rewritten,
            dead_sessions=tuple(self.dead.values()),
        )


def _without(stock: Stock, packs: frozenset[bytes]) -> Stock:
    """The stock as it would be without these packs, of which nothing is needed."""
    sizes = {pack: size for pack, size in stock.sizes.items() if pack not in packs}
    listed = {pack: size for pack, size in stock.listed.items() if pack not in packs}
    after = Stock(stock.backups, sizes, listed, stock.index.without(set(packs)))
    after.carry_over(stock)
    return after
