"""Checks a repository: is everything there that the backups name, and is it what was written?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

from vmsnap.errors import DamageFound, ObjectNotFound
from vmsnap.repository.blobs import BlobReader
from vmsnap.repository.format import (
    INDEX_PREFIX,
    MANIFESTS_PREFIX,
    PACKS_PREFIX,
    ZERO_ID,
    BlobKind,
    pack_key,
    pack_of_key,
)
from vmsnap.repository.index import IndexedPack, open_index
from vmsnap.repository.loading import IndexLoader
from vmsnap.repository.manifest import Manifest
from vmsnap.repository.packs import check_blobs, open_pack
from vmsnap.repository.reader import ImageReader
from vmsnap.repository.tree import ImageRecord, Node, children, decode_node, node_bytes, root_node

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository

Progress: TypeAlias = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Touched:
    """What of a backup is lost: `part` is ``disk vda``, ``memory pc.ram``, ``device state`` or, where the manifest
    itself is damaged, ``all``; `offset` is where the first lost range begins, `lost_bytes` how much is lost in all.
    """

    backup: str
    part: str
    offset: int = 0
    lost_bytes: int = 0


@dataclass(frozen=True)
class CheckFinding:
    """One thing that is not as it should be. `object` is the key of the stored object, or empty where it is unknown
    which one it would be. `severity`: ``damage``, or ``note`` where no backup loses anything.
    """

    object: str
    severity: str
    message: str
    touches: tuple[Touched, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What a check has found, and how much it has looked at."""

    backups: int
    packs: int
    read_bytes: int
    findings: tuple[CheckFinding, ...]

    @property
    def damaged(self) -> bool:
        """Whether any finding is damage."""
        return any(finding.severity == "damage" for finding in self.findings)

    def raise_if_damaged(self) -> None:
        """Raise what was found as one error.

        :raises DamageFound: there is damage; the message names the first one and its backups
        """
        damages = [finding for finding in self.findings if finding.severity == "damage"]
        if damages:
            touched = sorted({f"{touch.backup}: {touch.part}" for finding in damages for touch in finding.touches})
            more = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
            raise DamageFound(f"{damages[0].message}{more}; touches {', '.join(touched) or 'no backup'}")


class _Findings:
    """Collects damage by what is damaged, and what each touches."""

    def __init__(self) -> None:
        self._touches: dict[tuple[str, str, str], dict[tuple[str, str], tuple[int, int]]] = {}
        self._lock = Lock()

    def add(self, key: str, message: str, touched: Touched | None = None, severity: str = "damage") -> None:
        with self._lock:
            touches = self._touches.setdefault((key, severity, message), {})
            if touched:
                part = (touched.backup, touched.part)
                offset, lost = touches.get(part, (touched.offset, 0))
                touches[part] = (min(offset, touched.offset), lost + touched.lost_bytes)

    def all(self) -> tuple[CheckFinding, ...]:
        return tuple(
            CheckFinding(key, severity, message, tuple(Touched(*part, *lost) for part, lost in touches.items()))
            for (key, severity, message), touches in self._touches.items()
        )


class _Checker:
    def __init__(self, repository: Repository, progress: Progress | None) -> None:
        self.repository = repository
        self.storage = repository.storage
        self.vault = repository.vault
        self.progress = progress
        self.findings = _Findings()
        self.read_bytes = 0
        self.sizes = self._pack_sizes()
        self.loader = IndexLoader(self.storage, self.vault)
        self.index = self.loader.load()
        self.bad_blobs: dict[bytes, tuple[str, str]] = {}
        self.clean_nodes: set[tuple[int, bytes]] = set()
        self.short_packs = {
            pack: self.sizes.get(pack, -1)
            for pack, size in self.index.pack_sizes.items()
            if self.sizes.get(pack, -1) != size
        }
        self.index = self.index.behind(set(self.short_packs))
        self.blobs = BlobReader(self.storage, self.vault, self.index)

    def _pack_sizes(self) -> dict[bytes, int]:
        sizes = {}
        for info in self.storage.list(PACKS_PREFIX):
            pack = pack_of_key(info.key)
            if pack:
                sizes[pack] = info.size_bytes
            else:
                self.findings.add(info.key, f"{info.key} is no pack, and not ours", severity="note")
        return sizes

    # -- objects

    def indexes_and_packs(self, read_data: bool) -> None:
        for key, damage in self.loader.damaged.items():
            self.findings.add(key, f"{damage.message}; its packs were asked instead")
        for pack, size in self.short_packs.items():
            key = pack_key(pack)
            there = "is missing" if size < 0 else f"has {size} bytes instead of {self.index.pack_sizes[pack]}"
            self.findings.add(key, f"{key} {there}")
        for pack in self.sizes.keys() - self.index.pack_sizes.keys():
            message = f"{pack_key(pack)} is listed by no index: an interrupted backup left it"
            self.findings.add(pack_key(pack), message, severity="note")
        if read_data:
            total = sum(self.sizes.values())
            for listed in self._listed():
                self._read_pack(listed)
                if self.progress:
                    self.progress(self.read_bytes, total)

    def _listed(self) -> Iterator[IndexedPack | bytes]:
        """Each pack that is there, with what the index says of it if it does; one index object in memory at a time."""
        seen: set[bytes] = set()
        for info in self.storage.list(INDEX_PREFIX):
            if info.key in self.loader.damaged:
                continue
            for pack in open_index(self.vault, info.key, self.storage.get(info.key)):
                if pack.id in self.sizes and pack.id not in seen:
                    seen.add(pack.id)
                    yield pack
        yield from self.sizes.keys() - seen

    def _read_pack(self, listed: IndexedPack | bytes) -> None:
        pack = listed if isinstance(listed, bytes) else listed.id
        key = pack_key(pack)
        try:
            data = self.storage.get(key)
        except ObjectNotFound:
            self.findings.add(key, f"{key} is missing")
            return
        self.read_bytes += len(data)
        entries = b"" if isinstance(listed, bytes) else listed.entries
        severity = "damage" if pack in self.index.pack_sizes else "note"
        try:
            own = open_pack(self.vault, pack, data)
            if entries and own != entries:
                self.findings.add(key, f"{key} and the index disagree about its blobs", severity=severity)
            entries = entries or own
        except DamageFound as e:
            self.findings.add(key, e.message, severity=severity)
        for entry, intact in check_blobs(self.vault, pack, data, entries):
            if not intact:
                message = f"{key}, the blob at {entry.offset}, is not what was written"
                self.findings.add(key, message, severity=severity)
                place = self.index.find(entry.id)
                if place and place.pack == pack:
                    self.bad_blobs[entry.id] = (key, message)

    # -- backups

    def backup(self, manifest: Manifest) -> None:
        for part, image in manifest.images:
            if image.chunks:
                self._walk(manifest.backup, part, image, root_node(image))

    def _walk(self, backup: str, part: str, image: ImageRecord, node: Node) -> bool:
        """Look at a subtree; returns whether all of it is there."""
        # The same node can stand in images of several sizes, so its length belongs to what was seen.
        seen = (node_bytes(image, node), node.id)
        if node.id == ZERO_ID or seen in self.clean_nodes:
            return True
        try:
            content = self.blobs.read(BlobKind.TREE, node.id, node_bytes(image, node))
            ids = decode_node(image, node, content)
        except DamageFound as e:
            self._lost(backup, part, image, node, e.message)
            return False
        if node.level == 1:
            clean = self._chunks(backup, part, image, node, ids)
        else:
            clean = all([self._walk(backup, part, image, child) for child in children(node, image, ids)])
        if clean:
            self.clean_nodes.add(seen)
        return clean

    def _chunks(self, backup: str, part: str, image: ImageRecord, node: Node, ids: bytes) -> bool:
        chunks = list(children(node, image, ids))
        there = self.index.contains([chunk.id for chunk in chunks])
        clean = True
        for chunk, known in zip(chunks, there, strict=True):
            if chunk.id == ZERO_ID or (known and not self.short_packs and not self.bad_blobs):
                continue
            place = self.index.find(chunk.id)
            if place is None:
                message = f"chunk {chunk.id.hex()[:16]} is missing: no pack that is known has it"
            elif place.offset + place.sealed_bytes > self.short_packs.get(place.pack, 1 << 63):
                message = "cut off"
            elif chunk.id not in self.bad_blobs:
                continue
            else:
                message = ""
            self._lost(backup, part, image, chunk, message)
            clean = False
        return clean

    def _lost(self, backup: str, part: str, image: ImageRecord, node: Node, message: str) -> None:
        """Note that what is below a node, or a chunk, is lost to a backup."""
        span = image.fanout**node.level * image.chunk_bytes
        start = node.number * span
        touched = Touched(backup, part, start, min(span, image.size_bytes - start))
        place = self.index.find(node.id)
        key = pack_key(place.pack) if place else ""
        if place and place.pack in self.short_packs:
            size = self.short_packs[place.pack]
            there = "is missing" if size < 0 else f"has {size} bytes instead of {self.index.pack_sizes[place.pack]}"
            message = f"{key} {there}"
        elif node.id in self.bad_blobs:
            message = self.bad_blobs[node.id][1]
        self.findings.add(key, message, touched)


def check_repository(repository: Repository, *, read_data: bool, progress: Progress | None) -> CheckReport:
    """See `Repository.check`."""
    # The manifests first: what they name was there before them, so an index that is read afterwards has it.
    damaged: list[DamageFound] = []
    manifests = repository.list(damaged.append)
    checker = _Checker(repository, progress)
    for damage in damaged:
        key = damage.message.split(" ", 1)[0]
        backup = key.removeprefix(MANIFESTS_PREFIX)
        checker.findings.add(key, damage.message, Touched(backup, "all"))
    checker.indexes_and_packs(read_data)
    for manifest in manifests:
        checker.backup(manifest)
    return CheckReport(len(manifests) + len(damaged), len(checker.sizes), checker.read_bytes, checker.findings.all())


def verify_backup(repository: Repository, manifest: Manifest, progress: Progress | None) -> CheckReport:
    """See `Repository.verify`."""
    findings = _Findings()
    blobs = BlobReader(repository.storage, repository.vault, repository.whole_index())
    total = sum(image.size_bytes for _, image in manifest.images)
    done = 0
    for part, image in manifest.images:
        before = done

        def found(offset: int, length: int, damage: DamageFound, part: str = part) -> None:
            touched = Touched(manifest.backup, part, offset, length)
            findings.add(damage.message.split(",")[0].split(" ")[0], damage.message, touched)

        def advance(bytes_done: int, _: int | None, before: int = before) -> None:
            if progress:
                progress(before + bytes_done, total)

        reader = ImageReader(blobs, image, f"{part} of {manifest.backup}")
        try:
            reader.verify(found, advance)
        except DamageFound as e:  # of the tree: what is below cannot even be looked for
            found(0, image.size_bytes, e)
        done += image.size_bytes
    return CheckReport(1, 0, done, findings.all())
