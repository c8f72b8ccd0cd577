"""A repository: made, opened, listed; the place where backups are written, read and forgotten.

Cheap to import and to open: what moves data is imported when data is moved.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

from vmsnap.errors import (
    AlreadyExists,
    DamageFound,
    NotARepository,
    ObjectExists,
    ObjectNotFound,
    StorageError,
    UnknownBackup,
    UsageError,
    WrongPassphrase,
)
from vmsnap.repository.config import ENCRYPTIONS, RepositoryConfig, config_digest, decode_config, encode_text
from vmsnap.repository.format import (
    CONFIG_KEY,
    FORMAT_VERSION,
    KEYS_PREFIX,
    MANIFESTS_PREFIX,
    PACKS_PREFIX,
    ChunkSizes,
    manifest_key,
    pack_of_key,
)
from vmsnap.repository.keyring import KeyInfo, KeyRing
from vmsnap.repository.keys import ROOT_BYTES, KeyCost, unwrap_root, wrap_root
from vmsnap.repository.manifest import LostRange, Manifest
from vmsnap.repository.manifests import load_manifest, load_manifests
from vmsnap.repository.occupied import config_at, refuse_occupied
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

if TYPE_CHECKING:
    from vmsnap.repository.findings import CheckReport, RepairReport
    from vmsnap.repository.gc import GcReport
    from vmsnap.repository.index import ChunkIndex
    from vmsnap.repository.loading import IndexLoader
    from vmsnap.repository.marking import PhaseProgress
    from vmsnap.repository.pruning import PruneReport
    from vmsnap.repository.reader import ImageReader
    from vmsnap.repository.retention import RetentionPolicy
    from vmsnap.repository.sessions import Session, SessionInfo, SessionKind
    from vmsnap.repository.subset import Subset
    from vmsnap.repository.tree import ImageRecord
    from vmsnap.repository.writer import BackupWriter

Progress: TypeAlias = Callable[[int, int | None], None]
Passphrase: TypeAlias = Callable[[], str]


class Repository:
    """An open repository. May be used by several threads at once, as its storage backend may.

    Made by `create` or `open`, never directly.
    """

    def __init__(
        self,
        storage: StorageBackend,
        config: RepositoryConfig,
        vault: Vault,
        keyring: KeyRing | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.storage = storage
        self.config = config
        self.vault = vault
        self._keyring = keyring
        self.cache_dir = cache_dir
        self._lock = Lock()
        self._loader: IndexLoader | None = None
        self.compression_level: int | None = None
        """Of zstd, for the backups that are written from now on; None: the default."""
        self.chunk_cache_bytes = 0
        """What `reader` may keep in `cache_dir` of what it reads from storage that is far away."""

    @property
    def id(self) -> str:
        """The repository's id, 32 hexadecimal digits."""
        return self.config.repository

    @property
    def encryption(self) -> str:
        """``none`` or ``aes256-gcm``."""
        return self.config.encryption

    @classmethod
    def create(
        cls,
        storage: StorageBackend,
        passphrase: str | None = None,
        encryption: str | None = None,
        *,
        chunks: ChunkSizes | None = None,
        key_cost: KeyCost | None = None,
    ) -> Repository:
        """Make a repository in an empty place and open it. It exists when its config, the last object, is there.

        :param encryption: ``none`` or ``aes256-gcm``; None: encrypted when there is a passphrase
        :raises UsageError: encryption without a passphrase, or an unknown one
        :raises AlreadyExists: there is a repository already, or something else; nothing was changed
        :raises StorageError: the storage failed
        """
        encryption = encryption or ("aes256-gcm" if passphrase else "none")
        if encryption not in ENCRYPTIONS:
            raise UsageError(f"{encryption!r} is no encryption", cure=f"choose one of: {', '.join(ENCRYPTIONS)}")
        if encryption != "none" and not passphrase:
            raise UsageError("encryption needs a passphrase", cure="give one, or --encryption none")
        sizes = (chunks or ChunkSizes()).checked()
        storage.create()
        refuse_occupied(storage)
        root, repository_id = os.urandom(ROOT_BYTES), os.urandom(16)
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        secret = root.hex() if encryption == "none" else None
        config = RepositoryConfig(FORMAT_VERSION, repository_id.hex(), encryption, now, chunks=sizes, secret=secret)
        data = encode_text(config)
        key = ""
        try:
            if encryption != "none" and passphrase:
                key, wrapped = wrap_root(root, passphrase, config_digest(data), created=now, cost=key_cost)
                storage.put(key, wrapped)
            storage.put(CONFIG_KEY, data, if_absent=True)
        except (ObjectExists, StorageError) as e:
            # The answer can have been lost: a key is removed only where no config of ours needs it.
            with suppress(StorageError):
                if key and config_at(storage) != data:
                    storage.delete(key)
            if isinstance(e, ObjectExists):
                raise AlreadyExists(f"somebody else has just made a repository at {storage.url}") from e
            raise
        keyring = KeyRing(storage, root, config_digest(data), key) if key else None
        return cls(storage, config, Vault(root, repository_id, encrypted=config.encrypted), keyring)

    @classmethod
    def open(
        cls, storage: StorageBackend, passphrase: str | Passphrase | None = None, *, cache_dir: Path | None = None
    ) -> Repository:
        """Open a repository.

        :param passphrase: a callable is asked only when the repository is encrypted
        :param cache_dir: where the index of a remote repository may be kept, see `IndexCache`; None: nowhere
        :raises NotARepository: there is none
        :raises WrongPassphrase: the passphrase opens none of its keys, or none was given
        :raises RepositoryError: a newer vmsnap wrote it
        :raises DamageFound: config or keys are damaged
        """
        try:
            data = storage.get(CONFIG_KEY)
        except ObjectNotFound as e:
            raise NotARepository(f"there is no vmsnap repository at {storage.url}", cure="vmsnap init makes one") from e
        config = decode_config(data)
        keys = [info.key for info in storage.list(KEYS_PREFIX)]
        if config.encrypted:
            if not keys:
                raise DamageFound("all key objects of the repository are missing", cure="bring keys/ back")
            if passphrase is None:
                raise WrongPassphrase("the repository is encrypted and no passphrase was given")
            objects = {key: storage.get(key) for key in keys}
            word = passphrase if isinstance(passphrase, str) else passphrase()
            key, root = _unwrapped(objects, word, config_digest(data))
            keyring = KeyRing(storage, root, config_digest(data), key)
        else:
            if keys:
                raise DamageFound("the repository has keys, and its config says that it is not encrypted")
            root, keyring = bytes.fromhex(config.secret or ""), None
        vault = Vault(root, bytes.fromhex(config.repository), encrypted=config.encrypted)
        return cls(storage, config, vault, keyring, cache_dir)

    # -- backups

    def list(self, on_damage: Callable[[DamageFound], None] | None = None) -> Sequence[Manifest]:
        """All backups, oldest first.

        :param on_damage: told of each manifest that is damaged or (as `NewerFormat`) that only a newer vmsnap can
            read, and the others are listed; None: the first one raises
        :raises DamageFound: a manifest is damaged
        :raises RepositoryError: a newer vmsnap wrote a manifest
        """
        keys = [info.key for info in self.storage.list(MANIFESTS_PREFIX)]
        return sorted(self._load(keys, on_damage), key=lambda manifest: (manifest.time, manifest.backup))

    def manifests_at(
        self, keys: Sequence[str], on_damage: Callable[[DamageFound], None] | None = None
    ) -> Sequence[Manifest]:
        """The backups whose manifests have these object keys, in any order; those that were removed are passed over.

        :param on_damage: as for `list`
        :raises DamageFound: one of them is damaged
        :raises RepositoryError: a newer vmsnap wrote one of them
        """
        return self._load(keys, on_damage)

    def manifest(self, backup: str) -> Manifest:
        """The backup of that id, or the only one whose id begins so.

        :raises UnknownBackup: there is none, or more than one
        :raises DamageFound: its manifest is damaged
        """
        key = manifest_key(backup)
        keys = [info.key for info in self.storage.list(key)] if backup else []
        if key in keys:
            keys = [key]
        # Keys are lower case, ids are not. A few are enough to see that it is not the only one.
        found = [manifest for manifest in self._load(keys[:100], None) if manifest.backup.startswith(backup)]
        if len(found) != 1:
            what = "more than one backup begins with" if found else "there is no backup"
            raise UnknownBackup(f"{what} {backup!r}", cure="vmsnap list shows them")
        return found[0]

    def latest(self, vm: str) -> Manifest | None:
        """The newest backup of that VM that can be read; None where there is none.

        :raises StorageError: the storage failed
        """
        # An id is the VM's name and a time that sorts; other VMs' names may begin so too.
        keys = [info.key for info in self.storage.list(manifest_key(f"{vm}-"))]
        for key in reversed(keys):
            found = load_manifest(self.storage, self.vault, key)
            if isinstance(found, Manifest) and found.vm == vm:
                return found
        return None

    def forget(self, backup: str) -> None:
        """Remove a backup by its whole id; its data stays until garbage collection. Atomic.

        :raises UnknownBackup: there is none
        """
        key = manifest_key(backup)
        try:
            self.storage.stat(key)
        except (ObjectNotFound, UsageError) as e:
            raise UnknownBackup(f"there is no backup {backup!r}", cure="vmsnap list shows them") from e
        self.storage.delete(key)

    def prune(
        self,
        policy: RetentionPolicy,
        vm: str | None = None,
        tags: Collection[str] = (),
        dry_run: bool = False,
        now: datetime | None = None,
    ) -> PruneReport:
        """Remove the backups that `policy` does not keep, the oldest first; their data stays until garbage collection.

        Killed anywhere, each backup is there whole or gone, and the next prune goes on. Manifests that cannot be read
        are left alone and reported. Blocks; idempotent.

        :param vm: look at this VM's backups alone
        :param tags: look at the backups alone that have one of these tags; the others neither count nor go
        :param dry_run: remove nothing, only say
        :param now: what the policy counts from; the present time when None
        :raises StorageError: the storage failed; a note says how many backups were removed
        """
        from vmsnap.repository.pruning import prune_repository

        return prune_repository(self, policy, vm=vm, tags=tags, dry_run=dry_run, now=now)

    def writer(self, *, level: int | None = None, purpose: str = "a backup") -> BackupWriter:
        """Begin a backup; see `BackupWriter`. Reads the index, and lists the packs: what lies in a pack that is missing
        or cut short is stored anew, so that the backup is whole whatever was lost before.

        :param level: of zstd; None: `compression_level`
        :param purpose: what the session of the backup is called, for people who wait for it
        :raises DamageFound: it cannot be known what garbage collection is about to delete
        :raises StorageError: the storage failed
        """
        from vmsnap.repository.garbage import condemned_packs
        from vmsnap.repository.writer import BackupWriter

        session = self.session("write", purpose)
        session.begin()
        try:
            # In this order: what is condemned after the first line waits for this session.
            unreliable = condemned_packs(self.storage, self.vault)
            index = self.index(refresh=True)
            unreliable |= self._lost_packs(index) | self._unlisted_packs()
            reliable = index.without(unreliable)
            level = self.compression_level if level is None else level
            return BackupWriter(self.storage, self.vault, reliable, self.config.chunks, level=level, session=session)
        except BaseException:
            session.end()
            raise

    def _unlisted_packs(self) -> frozenset[bytes]:
        """The packs in the index that only they themselves list."""
        with self._lock:
            return self._loader.unlisted if self._loader else frozenset()

    def _lost_packs(self, index: ChunkIndex) -> set[bytes]:
        """The packs that are missing or have another size than the index says."""
        sizes = {pack_of_key(info.key): info.size_bytes for info in self.storage.list(PACKS_PREFIX)}
        return {pack for pack, size_bytes in index.pack_sizes.items() if sizes.get(pack) != size_bytes}

    def whole_index(self) -> ChunkIndex:
        """The index as it is now, to read by: a chunk that was stored anew, since its pack was lost, is found there."""
        index = self.index(refresh=True)
        return index.behind(self._lost_packs(index))

    def reader(self, image: ImageRecord, label: str = "the image", *, lost: Sequence[LostRange] = ()) -> ImageReader:
        """Open an image of a backup for reading.

        :param label: what messages call it, such as ``disk vda of vm001-…``
        :param lost: ranges in which what is lost reads as zeros, see `accepted_losses`
        """
        from vmsnap.repository.blobs import BlobReader
        from vmsnap.repository.chunkcache import ChunkCache
        from vmsnap.repository.reader import ImageReader

        # The image may be younger than the index that is in memory.
        cache = ChunkCache.beside(self.storage, self.cache_dir, self.id, self.chunk_cache_bytes)
        blobs = BlobReader(self.storage, self.vault, self.whole_index(), self.whole_index, cache)
        return ImageReader(blobs, image, label, lost)

    def gc(
        self,
        progress: PhaseProgress | None = None,
        dead_after_seconds: float = 86400.0,
        dry_run: bool = False,
    ) -> GcReport:
        """Delete what no backup needs, and write packs anew of which little is needed. Blocks.

        Safe beside running backups and restores; what they may rely on is condemned, and deleted by a later run. Killed
        anywhere, the repository is whole and the next run goes on. Idempotent.

        :param dead_after_seconds: sessions of which nothing was heard for so long are taken for dead
        :param dry_run: change nothing, only say
        :raises Busy: another garbage collection is at work
        :raises DamageFound: something is damaged, so that it cannot be known what is needed; nothing was deleted
        :raises RepositoryError: a newer vmsnap wrote something, or this run was taken for dead by another one
        :raises StorageError: the storage failed
        """
        from vmsnap.repository.gc import collect_garbage

        return collect_garbage(self, progress, dead_after_seconds, dry_run)

    # -- sessions

    def session(self, kind: SessionKind, purpose: str) -> Session:
        """A session around an operation, to be entered before the operation reads anything: garbage collection deletes
        nothing that a session relies on. ``with repository.session("read", "restore of vm001-…"):``

        :param purpose: for people who wait for it
        """
        from vmsnap.repository.sessions import Session

        return Session(self.storage, self.vault, kind, purpose)

    def sessions(self, dead_after_seconds: float = 86400.0) -> Sequence[SessionInfo]:
        """Who uses the repository now, living and dead ones. Blocks.

        :raises StorageError: the storage failed
        """
        from vmsnap.repository.sessions import list_sessions

        return list_sessions(self.storage, self.vault, dead_after_seconds)

    # -- passphrase keys

    def keys(self) -> tuple[KeyInfo, ...]:
        """The passphrase keys, the oldest first; damaged ones too.

        :raises UsageError: the repository is not encrypted
        """
        return self._keys().keys()

    def add_key(self, passphrase: str, label: str = "", *, cost: KeyCost | None = None) -> str:
        """Let a further passphrase open the repository; returns the id of its key. Atomic. Takes a tenth of a second
        and 64 MiB for each key that there is.

        :param label: for people; stands in the storage unencrypted
        :raises UsageError: the repository is not encrypted, the passphrase is empty or opens a key already
        :raises StorageError: the storage failed
        """
        return self._keys().add(passphrase, label, cost)

    def remove_key(self, key_id: str) -> None:
        """Remove a key, damaged ones too: its passphrase opens the repository no longer. Who has opened it with that
        may have kept the root secret, and there is no way to take that back. Atomic.

        :raises UsageError: the repository is not encrypted, it is the key that opened it, or the last one
        :raises NotFound: there is no such key
        :raises Busy: somebody removed the other keys meanwhile; the key is still there
        :raises StorageError: the storage failed
        """
        self._keys().remove(key_id)

    def change_passphrase(self, passphrase: str, *, cost: KeyCost | None = None) -> str:
        """Put a key for `passphrase` in the place of the one that opened the repository; returns its id.

        The new key is read back and opened before the old one is removed. Killed in between, both passphrases open the
        repository, and doing it again finishes it.

        :raises UsageError: the repository is not encrypted, the passphrase is empty or the same as before
        :raises StorageError: the storage failed; the message says where the old passphrase still opens
        """
        return self._keys().change(passphrase, cost)

    def _keys(self) -> KeyRing:
        if self._keyring is None:
            raise UsageError("the repository is not encrypted and has no keys")
        return self._keyring

    # -- integrity

    def check(
        self, *, read_data: bool = False, subset: Subset | None = None, progress: Progress | None = None
    ) -> CheckReport:
        """Check all of the repository: that everything that a backup names is there and, with `read_data`, that
        every byte is what was written. Blocks. Changes nothing.

        :param subset: read that share of the packs alone; all else is checked as ever
        :raises UsageError: a share, and no data is to be read
        :raises StorageError: the storage failed
        """
        from vmsnap.repository.check import check_repository
        from vmsnap.repository.subset import Subset

        if subset and not read_data:
            raise UsageError("a share of the packs can be chosen only where data is read", cure="add --read-data")
        return check_repository(self, subset=(subset or Subset()) if read_data else None, progress=progress)

    def verify(self, backup: str, progress: Progress | None = None) -> CheckReport:
        """Read and authenticate all of one backup, going on behind what is damaged. Blocks. Changes nothing.

        :raises UnknownBackup: there is none
        :raises DamageFound: its manifest is damaged
        :raises StorageError: the storage failed
        """
        from vmsnap.repository.check import verify_backup

        return verify_backup(self, self.manifest(backup), progress=progress)

    def repair(
        self, *, dry_run: bool = False, forget_damaged: bool = False, progress: Progress | None = None
    ) -> RepairReport:
        """Save all that can be saved, and note in each backup what it has lost. Reads every byte. Blocks.

        Killed anywhere it leaves the repository no worse than it was, and can be run again. A repository that is whole
        stays as it is. Backups, restores and checks may go on meanwhile.

        :param dry_run: change nothing, only say
        :param forget_damaged: delete manifests that cannot be read: nobody can restore these backups any more
        :raises Busy: a garbage collection or another repair is at work; nothing was changed
        :raises StorageError: the storage failed; run it again
        """
        from vmsnap.repository.repair import repair_repository

        return repair_repository(self, dry_run=dry_run, forget_damaged=forget_damaged, progress=progress)

    def index(self, *, refresh: bool = False) -> ChunkIndex:
        """The chunks that the repository has; read when first used, and again when told."""
        from vmsnap.repository.cache import IndexCache
        from vmsnap.repository.loading import IndexLoader

        with self._lock:
            if self._loader is None:
                cache = IndexCache.beside(self.storage, self.cache_dir, self.id)
                self._loader = IndexLoader(self.storage, self.vault, cache)
                refresh = True
            return self._loader.load() if refresh else self._loader.index

    def _load(self, keys: Sequence[str], on_damage: Callable[[DamageFound], None] | None) -> Sequence[Manifest]:
        return load_manifests(self.storage, self.vault, keys, on_damage)


def _unwrapped(objects: Mapping[str, bytes], passphrase: str, bound: bytes) -> tuple[str, bytes]:
    """As `unwrap_root`. That takes a quarter of a second of one processor, by design; another one imports meanwhile
    what nearly every command goes on with, which takes half as long.
    """
    with ThreadPoolExecutor(1, "vmsnap-key") as thread:
        unwrapping = thread.submit(unwrap_root, objects, passphrase, bound)
        importlib.import_module("vmsnap.repository.loading")
        return unwrapping.result()
