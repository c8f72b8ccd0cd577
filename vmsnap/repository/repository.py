"""A repository: made, opened, listed; the place where backups are written, read and forgotten.

Cheap to import and to open: what moves data is imported when data is moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
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
from vmsnap.repository.keys import ROOT_BYTES, KeyCost, unwrap_root, wrap_root
from vmsnap.repository.manifest import Manifest, open_manifest
from vmsnap.repository.seal import Vault
from vmsnap.roles.storage import StorageBackend

if TYPE_CHECKING:
    from vmsnap.repository.check import CheckReport
    from vmsnap.repository.index import ChunkIndex
    from vmsnap.repository.loading import IndexLoader
    from vmsnap.repository.reader import ImageReader
    from vmsnap.repository.tree import ImageRecord
    from vmsnap.repository.writer import BackupWriter

Progress: TypeAlias = Callable[[int, int | None], None]
Passphrase: TypeAlias = Callable[[], str]

_LIST_THREADS = 8


class Repository:
    """An open repository. May be used by several threads at once, as its storage backend may.

    Made by `create` or `open`, never directly.
    """

    def __init__(self, storage: StorageBackend, config: RepositoryConfig, vault: Vault) -> None:
        self.storage = storage
        self.config = config
        self.vault = vault
        self._lock = Lock()
        self._loader: IndexLoader | None = None

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
        _refuse_occupied(storage)
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
                if key and _config_of(storage) != data:
                    storage.delete(key)
            if isinstance(e, ObjectExists):
                raise AlreadyExists(f"somebody else has just made a repository at {storage.url}") from e
            raise
        return cls(storage, config, Vault(root, repository_id, encrypted=config.encrypted))

    @classmethod
    def open(cls, storage: StorageBackend, passphrase: str | Passphrase | None = None) -> Repository:
        """Open a repository.

        :param passphrase: a callable is asked only when the repository is encrypted
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
            root = unwrap_root(objects, word, config_digest(data))
        else:
            if keys:
                raise DamageFound("the repository has keys, and its config says that it is not encrypted")
            root = bytes.fromhex(config.secret or "")
        return cls(storage, config, Vault(root, bytes.fromhex(config.repository), encrypted=config.encrypted))

    # -- backups

    def list(self, on_damage: Callable[[DamageFound], None] | None = None) -> Sequence[Manifest]:
        """All backups, oldest first.

        :param on_damage: told of each manifest that is damaged, and the others are listed; None: the first one raises
        :raises DamageFound: a manifest is damaged
        """
        keys = [info.key for info in self.storage.list(MANIFESTS_PREFIX)]
        return sorted(self._load(keys, on_damage), key=lambda manifest: (manifest.time, manifest.backup))

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

    def writer(self, *, level: int | None = None) -> BackupWriter:
        """Begin a backup; see `BackupWriter`. Reads the index, and lists the packs: what lies in a pack that is missing
        or cut short is stored anew, so that the backup is whole whatever was lost before.

        :param level: of zstd
        :raises StorageError: the storage failed
        """
        from vmsnap.repository.writer import BackupWriter

        index = self.index(refresh=True)
        index = index.without(self._lost_packs(index))
        return BackupWriter(self.storage, self.vault, index, self.config.chunks, level=level)

    def _lost_packs(self, index: ChunkIndex) -> set[bytes]:
        """The packs that are missing or have another size than the index says."""
        sizes = {pack_of_key(info.key): info.size_bytes for info in self.storage.list(PACKS_PREFIX)}
        return {pack for pack, size_bytes in index.pack_sizes.items() if sizes.get(pack) != size_bytes}

    def whole_index(self) -> ChunkIndex:
        """The index as it is now, to read by: a chunk that was stored anew, since its pack was lost, is found there."""
        index = self.index(refresh=True)
        return index.behind(self._lost_packs(index))

    def reader(self, image: ImageRecord, label: str = "the image") -> ImageReader:
        """Open an image of a backup for reading.

        :param label: what messages call it, such as ``disk vda of vm001-…``
        """
        from vmsnap.repository.blobs import BlobReader
        from vmsnap.repository.reader import ImageReader

        # The image may be younger than the index that is in memory.
        return ImageReader(BlobReader(self.storage, self.vault, self.whole_index()), image, label)

    # -- integrity

    def check(self, *, read_data: bool = False, progress: Progress | None = None) -> CheckReport:
        """Check all of the repository: that everything that a backup names is there and, with `read_data`, that
        every byte is what was written. Blocks.

        :raises StorageError: the storage failed
        """
        from vmsnap.repository.check import check_repository

        return check_repository(self, read_data=read_data, progress=progress)

    def verify(self, backup: str, progress: Progress | None = None) -> CheckReport:
        """Read and authenticate all of one backup. Blocks.

        :raises UnknownBackup: there is none
        :raises DamageFound: its manifest is damaged
        :raises StorageError: the storage failed
        """
        from vmsnap.repository.check import verify_backup

        return verify_backup(self, self.manifest(backup), progress=progress)

    def index(self, *, refresh: bool = False) -> ChunkIndex:
        """The chunks that the repository has; read when first used, and again when told."""
        from vmsnap.repository.loading import IndexLoader

        with self._lock:
            if self._loader is None:
                self._loader = IndexLoader(self.storage, self.vault)
                refresh = True
            return self._loader.load() if refresh else self._loader.index

    def _load(self, keys: Sequence[str], on_damage: Callable[[DamageFound], None] | None) -> Sequence[Manifest]:
        """The manifests under `keys`; those that are deleted meanwhile are passed over."""
        if len(keys) <= _LIST_THREADS:
            results = [self._load_one(key) for key in keys]
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(_LIST_THREADS, "vmsnap-list") as threads:
                results = list(threads.map(self._load_one, keys))
        manifests = []
        for result in results:
            if isinstance(result, Manifest):
                manifests.append(result)
            elif result is not None:
                if on_damage is None:
                    raise result
                on_damage(result)
        return manifests

    def _load_one(self, key: str) -> Manifest | DamageFound | None:
        try:
            return open_manifest(self.vault, key, self.storage.get(key))
        except ObjectNotFound:
            return None
        except UsageError:
            return DamageFound(f"{key!r} is no manifest: something else lies among them")
        except DamageFound as e:
            return e


def _config_of(storage: StorageBackend) -> bytes | None:
    try:
        return storage.get(CONFIG_KEY)
    except ObjectNotFound:
        return None


def _refuse_occupied(storage: StorageBackend) -> None:
    try:
        storage.stat(CONFIG_KEY)
    except ObjectNotFound:
        pass
    else:
        raise AlreadyExists(f"there is a repository at {storage.url} already", cure="choose another place")
    for info in storage.list():
        raise AlreadyExists(f"{storage.url} is not empty: it has {info.key}", cure="choose an empty place")
