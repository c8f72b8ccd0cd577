"""What `doctor` says of an SFTP server: how far one gets, and what is missing there."""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Iterator
from pathlib import Path

from vmsnap.errors import VmsnapError
from vmsnap.model import Finding
from vmsnap_storage_backends.sftp.address import SftpAddress
from vmsnap_storage_backends.sftp.connection import connect
from vmsnap_storage_backends.sftp.conversation import Conversation, Lost, Refused
from vmsnap_storage_backends.sftp.names import free_room, look, read_folders
from vmsnap_storage_backends.sftp.wire import FSYNC, HARDLINK, POSIX_RENAME, STATVFS, Attributes, Malformed

_OURS = {"config", "keys", "index", "manifests", "packs", "sessions", "garbage", "lost+found", ".unfinished"}
_SHOWN = 3


def examine(address: SftpAddress, config_file: Path | None, seconds: float) -> list[Finding]:
    """Look, from the name of the host to the folder. Changes nothing, raises no `VmsnapError`."""
    subject = f"server {address.host}"
    try:
        connection = connect(address, config_file, seconds)
    except Lost as e:
        return [
            Finding(
                subject, "missing", str(e), "see that its sshd runs, that the port is right and no firewall between"
            )
        ]
    except VmsnapError as e:
        return [Finding(subject, "missing", e.message, e.cure)]
    try:
        found = [Finding(subject, "ok", "its host key is known, and it lets us in")]
        found += _extensions(subject, connection.talk)
        found += _folder(address, connection.talk)
        return found
    except (Lost, Malformed) as e:
        return [Finding(subject, "missing", f"the connection broke: {e}", "try again")]
    finally:
        connection.close()


def _extensions(subject: str, talk: Conversation) -> Iterator[Finding]:
    openssh = "OpenSSH's internal-sftp has it"
    if FSYNC not in talk.extensions:
        yield Finding(subject, "note", "no fsync: a power cut there can take what was stored just before", openssh)
    if POSIX_RENAME not in talk.extensions:
        yield Finding(subject, "note", "no posix-rename: what is replaced is gone for a moment", openssh)
    if HARDLINK not in talk.extensions:
        yield Finding(subject, "note", "no hardlink: two writers at the same moment are not told apart", openssh)


def _folder(address: SftpAddress, talk: Conversation) -> Iterator[Finding]:
    subject = f"folder {address.path} on {address.host}"
    try:
        found = look(talk, address.path)
        if found is None:
            yield _missing(subject, address.path, talk)
            return
        if not found.is_folder:
            yield Finding(subject, "missing", "is not a folder", "choose another path")
            return
        (entries,) = read_folders(talk, [address.path])
    except Refused as e:
        yield Finding(subject, "missing", f"cannot be read: {e.message}", "let this user read and write it")
        return
    if not _may_write(found, look(talk, ".")):
        yield Finding(subject, "missing", "this user may not write to it", "change its owner or mode, or use its owner")
        return
    foreign = sorted(entry.name for entry in entries or () if entry.name not in _OURS)
    names = {entry.name for entry in entries or ()}
    if foreign and "config" not in names:
        shown = ", ".join(foreign[:_SHOWN])
        yield Finding(subject, "missing", f"holds what is not vmsnap's: {shown}", "choose an empty folder")
        return
    room = free_room(talk, address.path)
    if room is None:
        said = "the server does not say how much is free" + ("" if STATVFS in talk.extensions else " (no statvfs)")
    else:
        said = f"{room // 2**20} MiB free"
    yield Finding(subject, "ok", said)
    if found.mode is not None and found.mode & 0o077:
        yield Finding(
            subject, "note", "other users there can look into it", f"chmod 700 {posixpath.normpath(address.path)}"
        )


def _missing(subject: str, path: str, talk: Conversation) -> Finding:
    parent = path
    while parent not in ("", "/") and look(talk, parent) is None:
        parent = posixpath.dirname(parent)
    above = parent or "."
    found = look(talk, above)
    if found is not None and found.mode is not None and not found.is_folder:
        return Finding(subject, "missing", f"{above} is not a folder", "choose another path")
    return Finding(subject, "note", "does not exist yet", "vmsnap init makes it")


def _may_write(folder: Attributes, home: Attributes | None) -> bool:
    """Whether it looks as if one may write to a folder. Version 3 cannot be asked, and trying would change something:
    who we are there is seen from whom the folder belongs to in which the server puts us.
    """
    if folder.mode is None or folder.owner is None or home is None or not home.owner:
        return True  # nobody knows, or root
    if folder.owner == home.owner:
        return bool(folder.mode & stat.S_IWUSR)
    return bool(folder.mode & (stat.S_IWGRP | stat.S_IWOTH))
