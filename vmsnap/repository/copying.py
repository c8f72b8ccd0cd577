"""Copies backups from one repository to another: what the other has is neither read nor stored again, everything else
is authenticated as it is read, and sealed with the keys of the other.

A copy keeps its id and everything that its manifest says, and notes in which repository the backup was made, so that it
is known again wherever it comes from. Chunks have other ids in the other repository, since ids are keyed; which is
which is remembered (see `translation`), or seen from backups that both repositories have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from threading import Lock

from vmsnap.errors import AlreadyExists, DamageFound, RepositoryError, StorageError, UsageError
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.chunkstore import ChunkStore
from vmsnap.repository.format import ID_BYTES, ZERO_ID
from vmsnap.repository.loss import accepted_losses
from vmsnap.repository.manifest import Manifest
from vmsnap.repository.reader import ImageReader
from vmsnap.repository.repository import Repository
from vmsnap.repository.translation import Translation, TranslationCache
from vmsnap.repository.tree import ImageRecord
from vmsnap.repository.walk import LossWalk
from vmsnap.repository.writer import BackupWriter, Progress

# What a killed copy may have to do again.
_CHECKPOINT_BYTES = 128 << 20
_LEARNED_AT_ONCE = 4096


@dataclass(frozen=True)
class CopiedBackup:
    """One copy. `size_bytes` is what its disks and memory have, `read_bytes` what was read of them, `stored_bytes` what
    was added to the other repository.
    """

    backup: str
    vm: str
    size_bytes: int
    read_bytes: int
    stored_bytes: int
    seconds: float


@dataclass(frozen=True)
class CopyReport:
    """What was done. `present` were there already; `damaged` could not be read, each with what is wrong."""

    copied: tuple[CopiedBackup, ...]
    present: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    dry_run: bool = False

    def raise_if_damaged(self) -> None:
        """:raises DamageFound: some backup was not copied"""
        if self.damaged:
            backup, message = self.damaged[0]
            more = f", and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
            raise DamageFound(f"{backup} was not copied: {message}{more}", cure="vmsnap repair saves what can be saved")


def copy_backups(
    source: Repository,
    target: Repository,
    backups: Sequence[str] = (),
    *,
    vm: str | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    checkpoint_bytes: int = _CHECKPOINT_BYTES,
) -> CopyReport:
    """Copy backups, the oldest first; those that are there already are passed over. Blocks.

    Each copy exists when all of it is durable and was seen to be there, by one atomic put. Killed anywhere, `target` is
    whole, and the next run goes on: what was stored up to `checkpoint_bytes` before is neither read nor stored again.
    Safe beside everything else that uses either repository.

    What a backup has lost, as repair has noted, is lost in the copy too. A backup that is damaged otherwise is not
    copied, and the report says so.

    :param backups: ids, or beginnings of ids; none: all
    :param vm: the backups of this VM alone
    :param progress: called with the bytes done and to do, from this thread
    :param dry_run: change nothing, only say
    :raises UsageError: both are the same repository
    :raises UnknownBackup: there is no such backup
    :raises AlreadyExists: `target` has another backup of the same id
    :raises StorageError: the storage of either failed; the copies that were finished are whole
    """
    if source.id == target.id:
        raise UsageError("both URLs name the same repository", cure="give two different ones")
    with source.session("read", f"copy to {target.id}"):
        return _Copying(source, target, progress, checkpoint_bytes).run(backups, vm, dry_run)


def origin_of(manifest: Manifest, repository: Repository) -> str:
    """The id of the repository in which a backup was made."""
    return manifest.origin or repository.id


class _Copying:
    """One run."""

    def __init__(
        self, source: Repository, target: Repository, progress: Progress | None, checkpoint_bytes: int
    ) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._checkpoint_bytes = checkpoint_bytes
        self._translation: Translation | None = None
        self._cache: TranslationCache | None = None
        if target.cache_dir:
            self._cache = TranslationCache(target.cache_dir / target.id / "copied" / source.id, target.vault, source.id)
        self._done_bytes = self._total_bytes = 0

    def run(self, backups: Sequence[str], vm: str | None, dry_run: bool) -> CopyReport:
        """See `copy_backups`."""
        damaged: list[tuple[str, str]] = []
        if backups:
            wanted = list({(found := self._source.manifest(each)).backup: found for each in backups}.values())
        else:
            wanted = list(self._source.list(lambda e: damaged.append(("a backup", e.message))))
        wanted = sorted((each for each in wanted if vm in (None, each.vm)), key=lambda each: (each.time, each.backup))
        there = {each.backup: each for each in self._target.list(lambda _: None)}
        present = [each.backup for each in wanted if self._is_there(each, there)]
        missing = [each for each in wanted if each.backup not in present]
        self._total_bytes = sum(_size_of(each) for each in missing)
        copied = []
        blobs = BlobReader(
            self._source.storage, self._source.vault, self._source.whole_index(), self._source.whole_index
        )
        for manifest in missing:
            if dry_run:
                copied.append(CopiedBackup(manifest.backup, manifest.vm, _size_of(manifest), 0, 0, 0.0))
                continue
            before = self._done_bytes
            try:
                copied.append(self._copy(manifest, blobs, wanted, there))
            except DamageFound as e:
                damaged.append((manifest.backup, e.message))
            self._done_bytes = before + _size_of(manifest)
        return CopyReport(tuple(copied), tuple(present), tuple(damaged), dry_run)

    def _is_there(self, manifest: Manifest, there: Mapping[str, Manifest]) -> bool:
        other = there.get(manifest.backup)
        if other is None:
            return False
        if origin_of(other, self._target) != origin_of(manifest, self._source):
            raise AlreadyExists(
                f"{self._target.storage.url} has another backup of the id {manifest.backup}, made elsewhere",
                cure="forget one of them",
            )
        return True

    def _copy(
        self, manifest: Manifest, blobs: BlobReader, wanted: Sequence[Manifest], there: dict[str, Manifest]
    ) -> CopiedBackup:
        begun = time.monotonic()
        parts = [part for part, _ in manifest.images]
        lost = accepted_losses(self._source, manifest, parts, accept=True)
        with self._target.writer(purpose=f"copy of {manifest.backup}") as writer:
            translation = self._known(writer, blobs, wanted, there)
            work = _Backup(writer, translation, self._cache, self._checkpoint_bytes)
            older = _newest_before(manifest, there.values())
            try:
                images = {
                    part: work.copy(
                        ImageReader(blobs, image, f"{part} of {manifest.backup}", lost.get(part, ())),
                        older.get(part),
                        self._report,
                    )
                    for part, image in manifest.images
                }
                work.keep()
            except (StorageError, DamageFound):
                # What is there is worth keeping for the next run.
                with suppress(StorageError):
                    writer.keep()
                    work.remember()
                raise
            copy = replace(
                _with_images(manifest, images),
                lost=tuple(each for part in parts for each in lost.get(part, ())),
                origin=origin_of(manifest, self._source),
            )
            self._see_that_it_is_there(copy)
            if not writer.adopt(copy):
                raise AlreadyExists(f"somebody else has just stored {manifest.backup} too", cure="run it again")
            there[copy.backup] = copy
            seconds = round(time.monotonic() - begun, 3)
            size, stored = _size_of(manifest), writer.stored_bytes
            return CopiedBackup(manifest.backup, manifest.vm, size, work.read_bytes, stored, seconds)

    def _known(
        self, writer: BackupWriter, blobs: BlobReader, wanted: Sequence[Manifest], there: Mapping[str, Manifest]
    ) -> Translation:
        """Which chunk is which, as far as that is known: remembered, or seen from backups that both have."""
        if self._translation is None:
            known = writer.known
            self._translation = self._cache.load(known) if self._cache else Translation()
            if not len(self._translation):
                target = BlobReader(self._target.storage, self._target.vault, known)
                newest = {each.vm: each for each in wanted if each.backup in there}
                for manifest in newest.values():
                    _learn(self._translation, manifest, blobs, there[manifest.backup], target)
        return self._translation

    def _see_that_it_is_there(self, copy: Manifest) -> None:
        """Walk the trees of the copy in the other repository, as everybody will who reads it.

        :raises RepositoryError: something is missing
        """
        index = self._target.whole_index()
        walk = LossWalk(BlobReader(self._target.storage, self._target.vault, index, self._target.whole_index), index)
        for part, image in copy.images:
            for loss in walk.losses(image):
                raise RepositoryError(
                    f"{part} of {copy.backup} is not whole in the copy, at {loss.offset}: {loss.cause}"
                )

    def _report(self, done_bytes: int) -> None:
        self._done_bytes += done_bytes
        if self._progress:
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)


class _Backup:
    """The images of one backup on their way."""

    def __init__(
        self, writer: BackupWriter, translation: Translation, cache: TranslationCache | None, checkpoint_bytes: int
    ) -> None:
        self._writer = writer
        self._translation = translation
        self._cache = cache
        self._checkpoint_bytes = checkpoint_bytes
        self._kept_bytes = 0
        self._learned: list[bytes] = []
        self._lock = Lock()
        self.read_bytes = 0

    def copy(self, reader: ImageReader, older: ImageRecord | None, done: Callable[[int], None]) -> ImageRecord:
        """Copy one image; returns how it is found in the other repository.

        :param older: an image there whose tree may be shared
        :param done: told of the bytes that are done, piece by piece
        """

        def store(chunks: ChunkStore, first: int, ids: bytes) -> bytes:
            return self._store(chunks, reader, first, ids)

        def progress(done_bytes: int) -> None:
            done(done_bytes)
            if self._writer.stored_bytes - self._kept_bytes >= self._checkpoint_bytes:
                self.keep()

        return self._writer.add_tree(reader.image, reader.chunk_lists(), store, progress, older=older)

    def keep(self) -> None:
        """Make durable what is stored, and remember it."""
        self._writer.flush()
        self._kept_bytes = self._writer.stored_bytes
        self.remember()

    def remember(self) -> None:
        """Remember which chunk is which; those that are not durable do not count when they are looked for."""
        with self._lock:
            learned, self._learned = self._learned, []
        if self._cache and learned:
            self._cache.save(b"".join(learned))

    def _store(self, chunks: ChunkStore, reader: ImageReader, first: int, ids: bytes) -> bytes:
        """The ids that these chunks have in the other repository; those that it lacks are read and stored. Runs in
        several threads.
        """
        theirs = [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]
        ours = [each if each == ZERO_ID else None for each in theirs]
        asked = [at for at, each in enumerate(theirs) if each != ZERO_ID]
        found = self._translation.find([theirs[at] for at in asked])
        stored = chunks.has([each or ZERO_ID for each in found])
        for at, each, there in zip(asked, found, stored, strict=True):
            ours[at] = each if there else None
        missing = [at for at, each in enumerate(ours) if each is None]
        if missing:
            fresh = self._read_and_store(chunks, reader, first, theirs, missing)
            for at, each in zip(missing, fresh, strict=True):
                ours[at] = each
        return b"".join(each or ZERO_ID for each in ours)

    def _read_and_store(
        self, chunks: ChunkStore, reader: ImageReader, first: int, theirs: Sequence[bytes], missing: Sequence[int]
    ) -> Sequence[bytes]:
        size = reader.image.chunk_bytes
        # The last chunk of an image may be shorter, and is the last one here then.
        lengths = [reader.image.chunk_length(first + at) for at in missing]
        places = {first + at: number * size for number, at in enumerate(missing)}
        content = memoryview(bytearray(sum(lengths)))
        wanted = [ZERO_ID] * len(theirs)
        for at in missing:
            wanted[at] = theirs[at]
        for number, chunk in reader.read_chunks(first, b"".join(wanted)):
            content[places[number] : places[number] + len(chunk)] = chunk
        joined = chunks.store_chunks(content, size)
        ours = [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]
        # What is lost reads as zeros, and stands for no other chunk of that id.
        pairs = [(theirs[at], each) for at, each in zip(missing, ours, strict=True) if each != ZERO_ID]
        self._translation.add([a for a, _ in pairs], [b for _, b in pairs])
        with self._lock:
            self.read_bytes += len(content)
            self._learned += (a + b for a, b in pairs)
        return ours


def _learn(translation: Translation, manifest: Manifest, blobs: BlobReader, copy: Manifest, target: BlobReader) -> None:
    """See from a backup that both repositories have which chunk is which. What cannot be read is passed over."""
    theirs, ours = dict(manifest.images), dict(copy.images)
    for part in theirs.keys() & ours.keys():
        image, other = theirs[part], ours[part]
        if (image.size_bytes, image.chunk_bytes) != (other.size_bytes, other.chunk_bytes):
            continue
        with suppress(DamageFound, RepositoryError):
            there, here = ImageReader(blobs, image, part), ImageReader(target, other, part)
            pairs = (pair for pair in zip(_ids(there), _ids(here), strict=True) if ZERO_ID not in pair)
            while some := list(islice(pairs, _LEARNED_AT_ONCE)):
                translation.add([first for first, _ in some], [second for _, second in some])


def _ids(reader: ImageReader) -> Iterator[bytes]:
    """The id of each chunk of an image, one by one."""
    for _, count, ids in reader.chunk_lists():
        for at in range(count):
            yield ids[at * ID_BYTES : (at + 1) * ID_BYTES] or ZERO_ID


def _newest_before(manifest: Manifest, others: Iterable[Manifest]) -> dict[str, ImageRecord]:
    """The images of the newest of these backups of the same VM that is not younger, by their names."""
    older = [each for each in others if each.vm == manifest.vm and each.time <= manifest.time]
    return dict(max(older, key=lambda each: each.time).images) if older else {}


def _size_of(manifest: Manifest) -> int:
    return sum(image.size_bytes for _, image in manifest.images)


def _with_images(manifest: Manifest, images: Mapping[str, ImageRecord]) -> Manifest:
    """The manifest with other images, named as in `Manifest.images`."""
    return replace(
        manifest,
        disks=tuple(replace(disk, image=images[f"disk {disk.device}"]) for disk in manifest.disks),
        memory=tuple(replace(each, image=images[f"memory {each.region}"]) for each in manifest.memory),
        device_state=images.get("device state"),
    )
