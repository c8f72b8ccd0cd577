"""What LIO is told on the machine where it serves: a program of its own, which vmsnap gives to that machine's Python
(3.7 and later, nothing but the standard library), with a request as its argument and an answer on its output, in JSON.

LIO is told by configfs, the kernel's own interface, as rtslib does it (its ``tcm.py`` and ``target.py``, 2.1):
targetcli shows what is made here like everything else. Secrets are copied from file to file, and never leave the
machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path("/sys/kernel/config/target")
CORE = ROOT / "core"
ISCSI = ROOT / "iscsi"
SECRETS = ("userid", "password", "userid_mutual", "password_mutual")
NOBODY = ("", "NULL")
"""What stands in the place of an account that there is not."""
NEW_LUN = "lun_1"
KINDS = ("iblock", "fileio")
FIRST_NUMBER = 1 << 20


class Refused(Exception):
    """What cannot be done, as a line."""


def read(attribute: Path) -> str:
    """The content of an attribute; empty where there is none."""
    try:
        return attribute.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except FileNotFoundError:
        return ""


def write(value: str, attribute: Path) -> None:
    """Set an attribute."""
    attribute.write_text(value, encoding="utf-8")


def folders(folder: Path) -> list[Path]:
    """The folders in a folder; none where it is gone."""
    try:
        found = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def groups(target: str) -> list[Path]:
    """The portal groups of a target."""
    return [path for path in folders(ISCSI / target) if path.name.startswith("tpgt_")]


def links(folder: Path) -> list[Path]:
    """The links in a LUN's folder: one, to its backing store; none where it was only begun, or is gone."""
    try:
        return [path for path in folder.iterdir() if path.is_symlink()]
    except FileNotFoundError:
        return []


def disks_of(group: Path) -> Iterator[dict[str, Any]]:
    """The LUNs of a portal group that are whole: one without a store was begun, or is being removed, and is no disk."""
    for lun in folders(group / "lun"):
        for link in links(lun):
            store = link.resolve()
            yield {
                "number": int(lun.name.rpartition("_")[2]),
                "path": read(store / "udev_path"),
                "read_only": "readonly: 1" in read(store / "info"),
            }


def sessions_of(group: Path) -> Iterator[str]:
    """The names of the initiators that are connected."""
    for access in folders(group / "acls"):
        # Else it reads "No active iSCSI Session for Initiator Endpoint: …" (lio_target_nacl_info_show).
        if "InitiatorName:" in read(access / "info"):
            yield access.name
    yield from read(group / "dynamic_sessions").replace("\0", "\n").split()


def account_name(folder: Path) -> str:
    """The account of an initiator, or of a portal group; empty where it has none."""
    name = read(folder / "auth" / "userid")
    return "" if name in NOBODY else name


def show(_: dict[str, Any]) -> dict[str, Any]:
    """All targets."""
    found = []
    for target in folders(ISCSI):
        if target.name == "discovery_auth":
            continue
        entry: dict[str, Any] = {"name": target.name}
        entry.update({key: [] for key in ("disks", "sessions", "accounts", "access", "portals")})
        for group in groups(target.name):
            entry["disks"] += disks_of(group)
            entry["sessions"] += sessions_of(group)
            entry["access"] += [path.name for path in folders(group / "acls")]
            entry["portals"] += [path.name for path in folders(group / "np")]
            entry["accounts"] += filter(None, map(account_name, [group, *folders(group / "acls")]))
        found.append(entry)
    return {"targets": found}


def export(request: dict[str, Any]) -> dict[str, Any]:
    """Make a target. What was begun is undone where it fails."""
    name, store_name = request["name"], request["store"]
    if (ISCSI / name).is_dir():
        return {"taken": True}
    like = next((group for group in groups(request["like"]) if folders(group / "lun")), None)
    if like is None:
        raise Refused(f"the target {request['like']} is gone")
    portals = folders(like / "np")
    if not portals:
        raise Refused(f"the target {request['like']} listens nowhere")
    store = open_store(store_name, Path(request["path"]), read_only=request["read_only"])
    try:
        (ISCSI / name).mkdir()
    except FileExistsError:
        close_stores(store_name)
        return {"taken": True}
    try:
        group = ISCSI / name / "tpgt_1"
        group.mkdir()
        (group / "lun" / NEW_LUN).mkdir()
        (group / "lun" / NEW_LUN / "store").symlink_to(store)
        for attribute in ("attrib/authentication", "param/AuthMethod"):
            if read(like / attribute):
                write(read(like / attribute), group / attribute)
        write("0", group / "attrib" / "generate_node_acls")
        copy_account(like, group)
        for initiator in request["initiators"]:
            admit(initiator, group, account_for(initiator, like, request["user"]), read_only=request["read_only"])
        for portal in portals:
            (group / "np" / portal.name).mkdir()
        write("1", group / "enable")
    except BaseException:
        remove(name)
        close_stores(store_name)
        raise
    return {}


def open_store(name: str, path: Path, *, read_only: bool) -> Path:
    """Make the backing store `name` of a file or a block device."""
    if "," in str(path) or len(str(path).split()) != 1:
        raise Refused(f"LIO takes no path such as {str(path)!r}")
    block, size_bytes = path.is_block_device(), path.stat().st_size
    close_stores(name)
    store = adapters_of(name)[0 if block else 1] / name
    try:
        store.parent.mkdir(exist_ok=True)
        store.mkdir()
        write(str(path), store / "udev_path")
        if block:
            write(f"udev_path={path}", store / "control")
            write(f"readonly={int(read_only)}", store / "control")
        else:
            write(f"fd_dev_name={path},fd_dev_size={size_bytes}", store / "control")
            write("fd_buffered_io=1", store / "control")
        write("1", store / "enable")
        write(os.urandom(16).hex(), store / "wwn" / "vpd_unit_serial")
    except BaseException:
        close_stores(name)
        raise
    return store


def adapters_of(name: str) -> list[Path]:
    """Where the backing store of that name is, one folder for each kind. The number is of that name alone, so that a
    folder that was only begun is found again; those that rtslib gives are smaller (``tcm.py``).
    """
    number = FIRST_NUMBER + int(name.rpartition("-")[2][:7], 16)
    return [CORE / f"{kind}_{number}" for kind in KINDS]


def close_stores(name: str) -> None:
    """Remove the backing store of that name, which only we give, with its adapter, whatever of them there is."""
    for adapter in adapters_of(name):
        if (adapter / name).is_dir():
            (adapter / name).rmdir()
        if adapter.is_dir() and not folders(adapter):
            adapter.rmdir()


def account_for(initiator: str, like: Path, user: str) -> Path:
    """The folder of the account that an initiator gets: the one that it has with the origin, else `user`'s, else the
    first that there is, else none.
    """
    own = like / "acls" / initiator
    if own.is_dir():
        return own
    known = [folder for folder in [*folders(like / "acls"), like] if account_name(folder)]
    return next((folder for folder in known if account_name(folder) == user), known[0] if known else own)


def copy_account(source: Path, target: Path) -> None:
    """Copy names and secrets of CHAP, of both ways."""
    for attribute in SECRETS:
        value = read(source / "auth" / attribute)
        if value not in NOBODY:
            write(value, target / "auth" / attribute)


def admit(initiator: str, group: Path, account: Path, *, read_only: bool) -> None:
    """Let an initiator use the LUN."""
    access = group / "acls" / initiator
    access.mkdir()
    copy_account(account, access)
    # One that need not say who it is with the origin, or must, is told the same here.
    wanted = read(account / "attrib" / "authentication") if account.name == initiator else ""
    if wanted:
        write(wanted, access / "attrib" / "authentication")
    (access / NEW_LUN).mkdir()
    (access / NEW_LUN / "lun").symlink_to(group / "lun" / NEW_LUN)
    write(str(int(read_only)), access / NEW_LUN / "write_protect")


def delete(request: dict[str, Any]) -> dict[str, Any]:
    """Remove a target, and the backing store that was made for it."""
    name = request["name"]
    used = sorted({session for group in groups(name) for session in sessions_of(group)})
    if used and not request["force"]:
        raise Refused(f"{name} is in use by {', '.join(used)}")
    remove(name)
    return release(request)


def release(request: dict[str, Any]) -> dict[str, Any]:
    """Remove a backing store that no target has."""
    if request["store"]:
        close_stores(request["store"])
    return {}


def remove(name: str) -> None:
    """Remove a target, whatever of it there is. Nobody can use it any more before anything is taken away."""
    for group in groups(name):
        if read(group / "enable") == "1":
            write("0", group / "enable")
        for access in folders(group / "acls"):
            for lun in folders(access):
                if lun.name.startswith("lun_"):
                    remove_lun(lun)
            access.rmdir()
        for lun in folders(group / "lun"):
            remove_lun(lun)
        for portal in folders(group / "np"):
            portal.rmdir()
        group.rmdir()
    if (ISCSI / name).is_dir():
        (ISCSI / name).rmdir()


def remove_lun(folder: Path) -> None:
    """Remove a LUN, or what maps one to an initiator."""
    for link in links(folder):
        link.unlink()
    folder.rmdir()


OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "show": show,
    "export": export,
    "delete": delete,
    "release": release,
}


def main(operation: str, request: str) -> None:
    """Do one thing, and print how it went."""
    answer: dict[str, Any] = {"absent": True}
    if ISCSI.is_dir():
        try:
            answer = OPERATIONS[operation](json.loads(request))
        except Refused as e:
            answer = {"refused": str(e)}
        except OSError as e:
            answer = {"refused": f"{e.strerror}: {e.filename}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
