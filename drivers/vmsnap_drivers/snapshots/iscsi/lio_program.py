"""What LIO is told on the machine where it serves: a program of its own, which vmsnap gives to that machine's Python
(3.7 and later, nothing but the standard library), with a request as its argument and an answer on its output, in JSON.

LIO is told by configfs, the kernel's own interface, as rtslib does it (its ``tcm.py`` and ``target.py``, 2.1):
targetcli shows what is made here like everything else. Secrets are copied from file to file, and never leave the
machine.

It is started for each thing that is asked, on machines that may be slow: it imports little, and no pathlib.
"""

from __future__ import annotations

import json
import os
import stat
import sys

TYPE_CHECKING = False  # as typing has it, without the import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

ROOT = "/sys/kernel/config/target"
CORE = f"{ROOT}/core"
ISCSI = f"{ROOT}/iscsi"
SECRETS = ("userid", "password", "userid_mutual", "password_mutual")
NOBODY = ("", "NULL")
"""What stands in the place of an account that there is not."""
NEW_LUN = "lun_1"
KINDS = ("iblock", "fileio")
FIRST_NUMBER = 1 << 20


class Refused(Exception):
    """What cannot be done, as a line."""


def read(attribute: str) -> str:
    """The content of an attribute; empty where there is none."""
    try:
        with open(attribute, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except FileNotFoundError:
        return ""


def write(value: str, attribute: str) -> None:
    """Set an attribute."""
    with open(attribute, "w", encoding="utf-8") as file:
        file.write(value)


def name_of(path: str) -> str:
    """The last part of a path."""
    return os.path.basename(path)


def paths_in(folder: str) -> list[str]:
    """All that is in a folder; nothing where it is gone."""
    try:
        return [f"{folder}/{name}" for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


def folders(folder: str) -> list[str]:
    """The folders in a folder; none where it is gone."""
    return [path for path in paths_in(folder) if os.path.isdir(path) and not os.path.islink(path)]


def groups(target: str) -> list[str]:
    """The portal groups of a target."""
    return [path for path in folders(f"{ISCSI}/{target}") if name_of(path).startswith("tpgt_")]


def links(folder: str) -> list[str]:
    """The links in a LUN's folder: one, to its backing store; none where it was only begun, or is gone."""
    return [path for path in paths_in(folder) if os.path.islink(path)]


def number_of(lun: str) -> int:
    """The number of the LUN with that folder."""
    return int(lun.rpartition("_")[2])


def disks_of(group: str) -> Iterator[dict[str, Any]]:
    """The LUNs of a portal group that are whole: one without a store was begun, or is being removed, and is no disk.

    They have the numbers by which initiators see them: those of their access, or the group's own where initiators
    without an access are let in, or nobody has any. A number that is several disks is there several times.
    """
    seen = {
        (number_of(mapped), os.path.realpath(link))
        for access in folders(f"{group}/acls")
        for mapped in folders(access)
        if name_of(mapped).startswith("lun_")
        for link in links(mapped)
    }
    if not seen or read(f"{group}/attrib/generate_node_acls") == "1":
        seen |= {(number_of(lun), lun) for lun in folders(f"{group}/lun")}
    for number, lun in sorted(seen):
        for link in links(lun):
            store = os.path.realpath(link)
            yield {
                "number": number,
                "path": read(f"{store}/udev_path"),
                "read_only": "readonly: 1" in read(f"{store}/info"),
            }


def sessions_of(group: str) -> Iterator[str]:
    """The names of the initiators that are connected."""
    for access in folders(f"{group}/acls"):
        # Else it reads "No active iSCSI Session for Initiator Endpoint: …" (lio_target_nacl_info_show).
        if "InitiatorName:" in read(f"{access}/info"):
            yield name_of(access)
    yield from read(f"{group}/dynamic_sessions").replace("\0", "\n").split()


def account_name(folder: str) -> str:
    """The account of an initiator, or of a portal group; empty where it has none."""
    name = read(f"{folder}/auth/userid")
    return "" if name in NOBODY else name


def show(_: dict[str, Any]) -> dict[str, Any]:
    """All targets."""
    found = []
    for target in folders(ISCSI):
        name = name_of(target)
        if name == "discovery_auth":
            continue
        entry: dict[str, Any] = {"name": name}
        entry.update({key: [] for key in ("disks", "sessions", "accounts", "access", "portals")})
        for group in groups(name):
            entry["disks"] += disks_of(group)
            entry["sessions"] += sessions_of(group)
            entry["access"] += [name_of(path) for path in folders(f"{group}/acls")]
            entry["portals"] += [name_of(path) for path in folders(f"{group}/np")]
            entry["accounts"] += filter(None, map(account_name, [group, *folders(f"{group}/acls")]))
        found.append(entry)
    return {"targets": found}


def export(request: dict[str, Any]) -> dict[str, Any]:
    """Make a target. What was begun is undone where it fails."""
    name, store_name = request["name"], request["store"]
    if os.path.isdir(f"{ISCSI}/{name}"):
        return {"taken": True}
    like = next((group for group in groups(request["like"]) if folders(f"{group}/lun")), None)
    if like is None:
        raise Refused(f"the target {request['like']} is gone")
    portals = folders(f"{like}/np")
    if not portals:
        raise Refused(f"the target {request['like']} listens nowhere")
    store = open_store(store_name, request["path"], read_only=request["read_only"])
    try:
        os.mkdir(f"{ISCSI}/{name}")
    except FileExistsError:
        close_stores(store_name)
        return {"taken": True}
    try:
        group = f"{ISCSI}/{name}/tpgt_1"
        os.mkdir(group)
        os.mkdir(f"{group}/lun/{NEW_LUN}")
        os.symlink(store, f"{group}/lun/{NEW_LUN}/store")
        for attribute in ("attrib/authentication", "param/AuthMethod"):
            if read(f"{like}/{attribute}"):
                write(read(f"{like}/{attribute}"), f"{group}/{attribute}")
        write("0", f"{group}/attrib/generate_node_acls")
        copy_account(like, group)
        for initiator in request["initiators"]:
            admit(initiator, group, account_for(initiator, like, request["user"]), read_only=request["read_only"])
        for portal in portals:
            os.mkdir(f"{group}/np/{name_of(portal)}")
        write("1", f"{group}/enable")
    except BaseException:
        remove(name)
        close_stores(store_name)
        raise
    return {}


def open_store(name: str, path: str, *, read_only: bool) -> str:
    """Make the backing store `name` of a file or a block device."""
    if "," in path or len(path.split()) != 1:
        raise Refused(f"LIO takes no path such as {path!r}")
    status = os.stat(path)
    block, size_bytes = stat.S_ISBLK(status.st_mode), status.st_size
    close_stores(name)
    adapter = adapters_of(name)[0 if block else 1]
    store = f"{adapter}/{name}"
    try:
        if not os.path.isdir(adapter):  # it may have been begun
            os.mkdir(adapter)
        os.mkdir(store)
        write(path, f"{store}/udev_path")
        if block:
            write(f"udev_path={path}", f"{store}/control")
            write(f"readonly={int(read_only)}", f"{store}/control")
        else:
            write(f"fd_dev_name={path},fd_dev_size={size_bytes}", f"{store}/control")
            write("fd_buffered_io=1", f"{store}/control")
        write("1", f"{store}/enable")
        write(os.urandom(16).hex(), f"{store}/wwn/vpd_unit_serial")
    except BaseException:
        close_stores(name)
        raise
    return store


def adapters_of(name: str) -> list[str]:
    """Where the backing store of that name is, one folder for each kind. The number is of that name alone, so that a
    folder that was only begun is found again; those that rtslib gives are smaller (``tcm.py``).
    """
    number = FIRST_NUMBER + int(name.rpartition("-")[2][:7], 16)
    return [f"{CORE}/{kind}_{number}" for kind in KINDS]


def close_stores(name: str) -> None:
    """Remove the backing store of that name, which only we give, with its adapter, whatever of them there is."""
    for adapter in adapters_of(name):
        if os.path.isdir(f"{adapter}/{name}"):
            os.rmdir(f"{adapter}/{name}")
        if os.path.isdir(adapter) and not folders(adapter):
            os.rmdir(adapter)


def account_for(initiator: str, like: str, user: str) -> str:
    """The folder of the account that an initiator gets: the one that it has with the origin, else `user`'s, else the
    first that there is, else none.
    """
    own = f"{like}/acls/{initiator}"
    if os.path.isdir(own):
        return own
    known = [folder for folder in [*folders(f"{like}/acls"), like] if account_name(folder)]
    return next((folder for folder in known if account_name(folder) == user), known[0] if known else own)


def copy_account(source: str, target: str) -> None:
    """Copy names and secrets of CHAP, of both ways."""
    for attribute in SECRETS:
        value = read(f"{source}/auth/{attribute}")
        if value not in NOBODY:
            write(value, f"{target}/auth/{attribute}")


def admit(initiator: str, group: str, account: str, *, read_only: bool) -> None:
    """Let an initiator use the LUN."""
    access = f"{group}/acls/{initiator}"
    os.mkdir(access)
    copy_account(account, access)
    # One that need not say who it is with the origin, or must, is told the same here.
    wanted = read(f"{account}/attrib/authentication") if name_of(account) == initiator else ""
    if wanted:
        write(wanted, f"{access}/attrib/authentication")
    os.mkdir(f"{access}/{NEW_LUN}")
    os.symlink(f"{group}/lun/{NEW_LUN}", f"{access}/{NEW_LUN}/lun")
    write(str(int(read_only)), f"{access}/{NEW_LUN}/write_protect")


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
        if read(f"{group}/enable") == "1":
            write("0", f"{group}/enable")
        for access in folders(f"{group}/acls"):
            for lun in folders(access):
                if name_of(lun).startswith("lun_"):
                    remove_lun(lun)
            os.rmdir(access)
        for lun in folders(f"{group}/lun"):
            remove_lun(lun)
        for portal in folders(f"{group}/np"):
            os.rmdir(portal)
        os.rmdir(group)
    if os.path.isdir(f"{ISCSI}/{name}"):
        os.rmdir(f"{ISCSI}/{name}")


def remove_lun(folder: str) -> None:
    """Remove a LUN, or what maps one to an initiator."""
    for link in links(folder):
        os.unlink(link)
    os.rmdir(folder)


OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "show": show,
    "export": export,
    "delete": delete,
    "release": release,
}


def main(operation: str, request: str) -> None:
    """Do one thing, and print how it went."""
    answer: dict[str, Any] = {"absent": True}
    if os.path.isdir(ISCSI):
        try:
            answer = OPERATIONS[operation](json.loads(request))
        except Refused as e:
            answer = {"refused": str(e)}
        except OSError as e:
            answer = {"refused": f"{e.strerror}: {e.filename}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
