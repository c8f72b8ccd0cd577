"""The manifest of a backup: what it is, and where its memory and disks are. Kept as JSON inside a seal.

Whoever reads a manifest gets one that was checked: its names are safe and its images are possible. Fields that are
not known here are passed over, so that later vmsnaps can add some within the same format version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from vmsnap.errors import DamageFound, RepositoryError, UsageError
from vmsnap.model import Json, Moment, check_name, from_json, to_json
from vmsnap.repository.format import FORMAT_VERSION, manifest_key
from vmsnap.repository.seal import BrokenSeal, Vault
from vmsnap.repository.tree import ImageRecord

_BACKUP_ID = re.compile(r"(?P<vm>.{1,64})-\d{8}T\d{6}Z-[0-9a-f]{6}")
_ORIGIN = re.compile(r"(?:[0-9a-f]{32})?")
_DEVICE = re.compile(r"[A-Za-z0-9#@_][A-Za-z0-9#@_ .:,;+=()\[\]-]{0,199}")
_TAG = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


@dataclass(frozen=True)
class MemoryImage:
    """The content of one block of guest RAM. `region` is the hypervisor's name for it and may hold any printable
    character.
    """

    region: str
    page_bytes: int
    image: ImageRecord

    @property
    def file_name(self) -> str:
        """A file name for it, unique among regions, that leaves no folder."""
        # A dash at the begin could pass for an option, a dot leaves or hides.
        return re.sub(r"^[.-]", lambda found: f"%{ord(found[0]):02X}", quote(self.region, safe=""))


@dataclass(frozen=True)
class DiskImage:
    """The content of one virtual disk; `address` is where it was, `format` what it was there; the image is raw. `mark`
    is what the snapshot mechanism called this instant of it (`DiskSnapshot.mark`).
    """

    device: str
    size_bytes: int
    format: str
    address: str
    mechanism: str
    image: ImageRecord
    mark: str = ""


@dataclass(frozen=True)
class ReadOnlyDisk:
    """A disk that the VM could not write to, a CD-ROM for instance: not copied, but named, with the place where it was
    and where a restored VM looks for it.
    """

    device: str
    size_bytes: int
    format: str
    address: str


@dataclass(frozen=True, kw_only=True)
class BackupFields:
    """What the caller of `BackupWriter.commit` knows of a backup.

    `definition` and `duplicate_details` are the hypervisor driver's, opaque. `moments` are the evidence of one
    instant. `freeze` says how disks were held while their snapshots were taken after the pause (``overlay``), empty
    where none was. `device_state` is None where only disks are kept. `memory_bytes` is the guest's RAM.
    """

    vm: str
    hypervisor: str
    mode: str
    definition: Json = None
    disks: tuple[DiskImage, ...] = ()
    read_only_disks: tuple[ReadOnlyDisk, ...] = ()
    memory: tuple[MemoryImage, ...] = ()
    device_state: ImageRecord | None = None
    capture: str = ""
    freeze: str = ""
    moments: tuple[Moment, ...] = ()
    pause_seconds: float | None = None
    resume_flag: bool = False
    duplicate_details: Json = None
    memory_bytes: int = 0
    tags: tuple[str, ...] = ()
    hypervisor_version: str = ""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackupStats:
    """What it took: bytes read from the sources (holes are not), bytes added to the repository, seconds."""

    read_bytes: int
    stored_bytes: int
    seconds: float


@dataclass(frozen=True)
class LostRange:
    """A range of an image that holds something that is lost; `part` names the image as `Manifest.images` does."""

    part: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Manifest(BackupFields):
    """One backup. `backup` is its id, `time` the UTC time by RFC 3339 that stands in the id too. `lost` is what repair
    could not save of it. `origin` is the id of the repository in which it was made, empty for the one in which it lies.
    """

    backup: str
    time: str
    stats: BackupStats
    vmsnap: str
    lost: tuple[LostRange, ...] = ()
    origin: str = ""
    version: int = FORMAT_VERSION

    @property
    def images(self) -> tuple[tuple[str, ImageRecord], ...]:
        """All images with the words that name them to people: ``disk vda``, ``memory pc.ram``, ``device state``."""
        images = [(f"disk {disk.device}", disk.image) for disk in self.disks]
        images += [(f"memory {memory.region}", memory.image) for memory in self.memory]
        if self.device_state:
            images.append(("device state", self.device_state))
        return tuple(images)

    def lost_of(self, part: str) -> tuple[LostRange, ...]:
        """What is lost of one image, named as in `images`."""
        return tuple(lost for lost in self.lost if lost.part == part)

    @property
    def lost_bytes(self) -> int:
        """How much is lost of all images."""
        return sum(lost.length for lost in self.lost)


@dataclass(frozen=True)
class _Versioned:
    version: int


def check_device(device: str) -> str:
    """Return `device` if a manifest may name a disk so, and a file be named by it.

    :raises UsageError: anything with slashes or control characters, beginning with a dot or dash, empty, or too long
    """
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"{device!r} cannot name a disk", cure="200 printable characters at most, without slashes")
    return device


def check_tag(tag: str) -> str:
    """Return `tag` if a backup may have it.

    :raises UsageError: control characters, empty, or more than 200 characters
    """
    if not _TAG.fullmatch(tag):
        raise UsageError(f"{tag!r} is not a valid tag", cure="200 characters at most, none of them control ones")
    return tag


def check_fields(fields: BackupFields) -> None:
    """Check names, and that images are possible ones.

    :raises UsageError: something is wrong; the message names it
    """
    check_name(fields.vm, "VM name")
    for tag in fields.tags:
        check_tag(tag)
    for read_only in fields.read_only_disks:
        check_device(read_only.device)
    for disk in fields.disks:
        check_device(disk.device)
        if disk.image.size_bytes != disk.size_bytes:
            raise UsageError(f"disk {disk.device} has {disk.size_bytes} bytes, its image {disk.image.size_bytes}")
    for memory in fields.memory:
        if not _TAG.fullmatch(memory.region):
            raise UsageError(f"{memory.region!r} cannot name a memory region")
    for what, names in (
        ("disks", [disk.device for disk in fields.disks] + [disk.device for disk in fields.read_only_disks]),
        ("memory regions", [memory.region for memory in fields.memory]),
    ):
        if len(set(names)) != len(names):
            raise UsageError(f"two {what} have the same name")
    images = [disk.image for disk in fields.disks] + [memory.image for memory in fields.memory]
    for image in images + ([fields.device_state] if fields.device_state else []):
        if fault := image.fault():
            raise UsageError(fault)


def check_lost(manifest: Manifest) -> None:
    """Check that what is noted as lost lies inside of images that there are, in order and without overlap.

    :raises UsageError: something is wrong; the message names it
    """
    sizes = {part: image.size_bytes for part, image in manifest.images}
    ends = dict.fromkeys(sizes, 0)
    for lost in manifest.lost:
        if lost.part not in sizes:
            raise UsageError(f"something is lost of {lost.part!r}, which the backup does not have")
        end = lost.offset + lost.length
        if lost.offset < ends[lost.part] or lost.length <= 0 or end > sizes[lost.part]:
            raise UsageError(f"an impossible range of {lost.part} is lost")
        ends[lost.part] = end


def seal_manifest(vault: Vault, manifest: Manifest) -> tuple[str, bytes]:
    """The object that holds a manifest: its key and its content."""
    key = manifest_key(manifest.backup)
    return key, vault.seal_object(key, to_json(manifest).encode())


def with_lost(vault: Vault, key: str, data: bytes, lost: Sequence[LostRange]) -> bytes:
    """The content of the manifest object `data` with another note of what is lost; all else, what this vmsnap does not
    know included, stays.

    :raises DamageFound: it is not what was written under `key`
    """
    try:
        fields = json.loads(vault.open_object(key, data))
    except (BrokenSeal, ValueError) as e:
        raise DamageFound(f"{key} is damaged: it is not what was written") from e
    fields["lost"] = [{"part": each.part, "offset": each.offset, "length": each.length} for each in lost]
    return vault.seal_object(key, json.dumps(fields, separators=(",", ":"), sort_keys=True).encode())


def open_manifest(vault: Vault, key: str, data: bytes) -> Manifest:
    """The manifest that is stored under `key`.

    :raises DamageFound: it is not what was written there
    :raises RepositoryError: a newer vmsnap wrote it
    """
    try:
        content = vault.open_object(key, data)
    except BrokenSeal as e:
        raise DamageFound(f"{key} is damaged: it is not what was written") from e
    try:
        version = from_json(content, _Versioned).version
        if version > FORMAT_VERSION:
            raise RepositoryError(f"{key} has format {version}, newer than this vmsnap", cure="install a newer one")
        manifest = from_json(content, Manifest)
        check_fields(manifest)
        check_lost(manifest)
        if not _ORIGIN.fullmatch(manifest.origin):
            raise UsageError(f"{manifest.origin!r} is no id of a repository")
        backup = _BACKUP_ID.fullmatch(manifest.backup)
    except (ValueError, RecursionError, UsageError) as e:
        raise DamageFound(f"{key} is damaged: {e}") from e
    if not backup or backup["vm"] != manifest.vm or manifest_key(manifest.backup) != key:
        raise DamageFound(f"{key} is damaged: it has the id {manifest.backup!r}")
    return manifest
