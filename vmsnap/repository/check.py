"""Checks a repository: is everything there that the backups name, and is it what was written?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from vmsnap.errors import DamageFound, NewerFormat, ObjectNotFound, RepositoryError
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.findings import DAMAGE, LOST, NOTE, CheckReport, Findings, object_in
from vmsnap.repository.format import INDEX_PREFIX, PACKS_PREFIX, is_index_key, manifest_key, pack_key, pack_of_key
from vmsnap.repository.index import open_index
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.loss import is_within
from vmsnap.repository.manifest import LostRange, Manifest
from vmsnap.repository.packstate import PackState, examine_packs
from vmsnap.repository.reader import ImageReader
from vmsnap.repository.reading import reading
from vmsnap.repository.smallobjects import check_small_objects
from vmsnap.repository.subset import Subset
from vmsnap.repository.walk import Loss, LossWalk

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository

Progress: TypeAlias = Callable[[int, int | None], None]

# How often packs that are missing are looked for again: garbage collection may be moving what they held.
_LOOKS = 3


class _Checker:
    """One check. The index is read before the packs are listed, so that what it names was there before."""

    def __init__(self, repository: Repository, findings: Findings) -> None:
        self.storage = repository.storage
        self.vault = repository.vault
        self.whole_index = repository.whole_index
        self.findings = findings
        self.read_bytes = 0
        self.read_packs = 0
        self.loader = IndexLoader(self.storage, self.vault)
        self.damaged: set[tuple[bytes, int]] = set()
        for _ in range(_LOOKS):
            self.index = self.loader.load()
            self.sizes, self.strays = _packs_there(repository)
            listed = self.index.pack_sizes
            self.short_packs = {pack for pack, size in listed.items() if self.sizes.get(pack, -1) != size}
            if not self.short_packs:
                break

    # -- objects

    def packs(self, subset: Subset | None, progress: Progress | None) -> None:
        """Look at the index and the packs; read those that `subset` chooses, none where that is None."""
        for key, damage in self.loader.damaged.items():
            if is_index_key(key):
                self.findings.add(key, f"{damage.message}; its packs were asked instead")
            else:
                self.findings.add(key, f"{key} is no index, and not ours", severity=NOTE)
        for pack in sorted(self.short_packs):
            self.findings.add(pack_key(pack), self._shortage(pack))
        for key in self.strays:
            self.findings.add(key, f"{key} is no pack, and not ours", severity=NOTE)
        for pack in self.sizes.keys() - self.index.pack_sizes.keys():
            message = f"{pack_key(pack)} is listed by no index: an interrupted backup left it"
            self.findings.add(pack_key(pack), message, severity=NOTE)
        if subset is None:
            return
        chosen = subset.chosen(self.sizes.keys())
        total = sum(self.sizes[pack] for pack in chosen)
        for state in examine_packs(self.storage, self.vault, self._listed(chosen)):
            self._judge(state)
            if progress:
                progress(self.read_bytes, total)

    def _listed(self, chosen: set[bytes]) -> Iterator[tuple[bytes, bytes | None]]:
        """Each of the chosen packs with what the index says of it; one index object in memory at a time."""
        seen: dict[bytes, int] = {}
        for info in self.storage.list(INDEX_PREFIX):
            try:
                packs = open_index(self.vault, info.key, self.storage.get(info.key))
            except (DamageFound, ObjectNotFound):  # told of already, or rewritten by garbage collection just now
                continue
            for pack in packs:
                if pack.id not in seen and pack.id in chosen:
                    yield pack.id, pack.entries
                if seen.setdefault(pack.id, hash(pack.entries)) != hash(pack.entries):
                    self.findings.add(info.key, f"{info.key} disagrees with another index about {pack_key(pack.id)}")
        for unlisted in sorted(chosen - seen.keys()):
            yield unlisted, None

    def _judge(self, state: PackState) -> None:
        self.read_bytes += state.size_bytes or 0
        self.read_packs += 1
        severity = DAMAGE if state.id in self.index.pack_sizes else NOTE
        for fault in state.faults if state.size_bytes is not None else ():
            self.findings.add(state.key, fault, severity=severity)
        for entry in state.damaged:
            self.findings.add(state.key, _blob_damage(state.id, entry.offset), severity=severity)
            self.damaged.add((state.id, entry.offset))

    def _shortage(self, pack: bytes) -> str:
        if pack not in self.sizes:
            return f"{pack_key(pack)} is missing"
        return f"{pack_key(pack)} has {self.sizes[pack]} bytes instead of {self.index.pack_sizes[pack]}"

    # -- backups

    def backups(self, manifests: Sequence[Manifest]) -> None:
        """Look for everything that the backups name."""
        readable = self.index.readable(self.sizes, self.damaged)
        nodes = BlobReader(self.storage, self.vault, self.index.behind(self.short_packs), self.whole_index)
        walk = LossWalk(nodes, readable)
        for manifest in manifests:
            noted = False
            for part, image in manifest.images:
                known = manifest.lost_of(part)
                for loss in walk.losses(image):
                    noted |= self._add(manifest, part, known, loss)
            if manifest.lost and not noted:
                _add_whole_again(self.findings, manifest)

    def _add(self, manifest: Manifest, part: str, known: Sequence[LostRange], loss: Loss) -> bool:
        """Tell of a loss; returns whether the manifest notes it already."""
        if isinstance(loss.cause, RepositoryError):
            _add_newer(self.findings, manifest, part, loss.cause)
            return False
        if is_within(known, loss.offset, loss.length):
            _add_noted(self.findings, manifest, part, loss.offset, loss.length)
            return True
        key, message = self._cause(loss)
        self.findings.add(key, message, (manifest.backup, part), loss.offset, loss.length)
        return False

    def _cause(self, loss: Loss) -> tuple[str, str]:
        """The object that a loss comes from, and what is wrong there, as it was told of the object itself."""
        if loss.cause:
            key = object_in(loss.cause.message)
            pack = pack_of_key(key)
            return key, self._shortage(pack) if pack in self.short_packs and pack else loss.cause.message
        place = self.index.find(loss.chunk)
        if place is None:
            return "", f"chunk {loss.chunk.hex()[:16]} is missing: no pack that is known has it"
        if (place.pack, place.offset) in self.damaged:
            return pack_key(place.pack), _blob_damage(place.pack, place.offset)
        return pack_key(place.pack), self._shortage(place.pack)


def check_repository(repository: Repository, *, subset: Subset | None, progress: Progress | None) -> CheckReport:
    """See `Repository.check`. `subset` is the share of the packs that is read; None: none of them."""
    findings = Findings()
    with repository.session("read", "check"):
        # The manifests first: what they name was there before them, so an index that is read afterwards has it.
        damaged: list[DamageFound] = []
        manifests = repository.list(damaged.append)
        for damage in damaged:
            key = object_in(damage.message)
            if isinstance(damage, NewerFormat):
                findings.add(key, str(damage), severity=NOTE)
            else:
                findings.add(key, damage.message, (key.rpartition("/")[2], "all"))
        check_small_objects(repository, findings)
        checker = _Checker(repository, findings)
        checker.packs(subset, progress)
        checker.backups(manifests)
        _drop_forgotten(repository, manifests, findings)
    return CheckReport(
        backups=len(manifests) + len(damaged),
        packs=len(checker.sizes),
        read_bytes=checker.read_bytes,
        findings=findings.all(),
        read_packs=checker.read_packs,
        subset=str(subset) if subset and subset != Subset() else "",
    )


def verify_backup(repository: Repository, manifest: Manifest, progress: Progress | None) -> CheckReport:
    """See `Repository.verify`."""
    findings = Findings()
    noted = False
    done = 0
    total = sum(image.size_bytes for _, image in manifest.images)
    with reading(repository, manifest.backup, f"verify of {manifest.backup}"):
        index = repository.whole_index()
        blobs = BlobReader(repository.storage, repository.vault, index, repository.whole_index)
        for part, image in manifest.images:
            before = done

            def found(offset: int, length: int, damage: DamageFound, part: str = part) -> None:
                nonlocal noted
                if is_within(manifest.lost_of(part), offset, length):
                    noted = True
                    _add_noted(findings, manifest, part, offset, length)
                else:
                    findings.add(object_in(damage.message), damage.message, (manifest.backup, part), offset, length)

            def advance(bytes_done: int, _: int | None, before: int = before) -> None:
                if progress:
                    progress(before + bytes_done, total)

            ImageReader(blobs, image, f"{part} of {manifest.backup}").verify(found, advance)
            done += image.size_bytes
    if manifest.lost and not noted:
        _add_whole_again(findings, manifest)
    return CheckReport(1, 0, done, findings.all())


def _packs_there(repository: Repository) -> tuple[dict[bytes, int], list[str]]:
    """The size of each pack that is there, and the keys of what lies among them."""
    sizes: dict[bytes, int] = {}
    strays = []
    for info in repository.storage.list(PACKS_PREFIX):
        pack = pack_of_key(info.key)
        if pack:
            sizes[pack] = info.size_bytes
        else:
            strays.append(info.key)
    return sizes, strays


def _drop_forgotten(repository: Repository, manifests: Sequence[Manifest], findings: Findings) -> None:
    """A backup that was removed meanwhile lacks nothing."""
    touched = {touch.backup for finding in findings.all() for touch in finding.touches}
    for manifest in manifests:
        if manifest.backup in touched:
            try:
                repository.storage.stat(manifest_key(manifest.backup))
            except ObjectNotFound:
                findings.drop_backup(manifest.backup)


def _blob_damage(pack: bytes, offset: int) -> str:
    return f"{pack_key(pack)}, the blob at {offset}, is not what was written"


def _add_noted(findings: Findings, manifest: Manifest, part: str, offset: int, length: int) -> None:
    key = manifest_key(manifest.backup)
    message = f"{key} notes what repair could not save"
    findings.add(key, message, (manifest.backup, part), offset, length, severity=LOST)


def _add_whole_again(findings: Findings, manifest: Manifest) -> None:
    key = manifest_key(manifest.backup)
    message = f"{key} notes a loss, and is whole again: vmsnap repair clears the note"
    findings.add(key, message, severity=NOTE)


def _add_newer(findings: Findings, manifest: Manifest, part: str, error: RepositoryError) -> None:
    message = f"{part} of {manifest.backup} cannot be checked: {error}"
    findings.add(manifest_key(manifest.backup), message, severity=NOTE)
