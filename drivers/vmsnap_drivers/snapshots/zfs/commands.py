"""ZFS's commands, as this mechanism gives them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from vmsnap.errors import DriverUnavailable, SnapshotError, SnapshotInUse
from vmsnap_drivers.runner import Output, Runner, one_line
from vmsnap_drivers.snapshots.zfs.lookup import FUSE_SOCKET

INSTALL: Final = "apt install zfsutils-linux zfs-dkms (Debian's contrib)"
KIND: Final = "vmsnap:kind"
PLAN: Final = "vmsnap:plan"
_NOBODYS: Final = "vmsnap:nothing"
"""A property that nothing has: there is nothing to be changed about it."""
_ASKING_SECONDS: Final = 60.0
_CHANGING_SECONDS: Final = 120.0
_SENDING_SECONDS: Final = 60.0
_BUSY_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.1
_CONTROL: Final = Path("/dev/zfs")
_IN_USE: Final = re.compile(r"\bbusy\b|has (children|dependent clones)")
_VERSION: Final = re.compile(r"^zfs-(?:kmod-)?v?(\d+)\.(\d+)\S*", re.MULTILINE)
# What each complaint calls for; libzfs_util.c of OpenZFS 2.1, and zfs-fuse 0.7.
_CURES: Final = (
    (r"permission denied|must be run as root", "run vmsnap as root, or let its user: zfs allow (docs/zfs.md)"),
    (r"modules? .*(loaded|auto-loaded)", "modprobe zfs"),
    (r"zfs-fuse daemon", "start zfs-fuse"),
    (r"out of space|no space", "free room in the pool, or give it another disk"),
    (
        r"busy",
        "end what uses it, or has copied this host's mounts: grep -l NAME /proc/*/mountinfo; then: vmsnap recover",
    ),
    (r"I/O is currently suspended", "zpool clear, once its disks are back"),
)


@dataclass(frozen=True)
class Flavour:
    """Which ZFS it is: `version` as it calls itself, `numbers` the first two of it."""

    fuse: bool
    version: str
    numbers: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Ours:
    """Something that we have made for the plan `plan`: a ``snapshot``, a ``reader`` or a ``clone``."""

    name: str
    kind: str
    plan: str


class Zfs:
    """ZFS of the place where `runner` runs commands."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._flavour: Flavour | None = None

    def usable(self) -> bool:
        """Whether ZFS is installed and can be asked here."""
        if self.runner.find("zfs") is None:
            return False
        return any(self.runner.may_use(each) for each in (_CONTROL, FUSE_SOCKET))

    def check_usable(self) -> None:
        """See that it is.

        :raises DriverUnavailable: it is not
        """
        if self.runner.find("zfs") is None:
            raise DriverUnavailable("the program zfs is not installed", cure=INSTALL)
        if not self.usable():
            for each in (_CONTROL, FUSE_SOCKET):
                if each.exists():
                    raise DriverUnavailable(f"we may not use {each}", cure="run vmsnap as root")
            raise DriverUnavailable("neither the kernel's module nor zfs-fuse answers", cure="modprobe zfs")

    def flavour(self) -> Flavour:
        """Which ZFS it is. zfs-fuse does not know the question.

        :raises SnapshotError: it cannot be asked
        :raises DriverUnavailable: it is not installed
        """
        if self._flavour is None:
            done = self._run(["zfs", "version"], _ASKING_SECONDS)
            found = _VERSION.search(done.stdout)
            if found and not done.status:
                self._flavour = Flavour(False, found[0].removeprefix("zfs-"), (int(found[1]), int(found[2])))
            elif "unrecognized command" in done.stderr:
                self._flavour = Flavour(True, "zfs-fuse")
            else:
                raise _failure(["zfs", "version"], done)
        return self._flavour

    def properties(self, names: Sequence[str], wanted: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """Properties, numbers in full, by the names of those that have them.

        :raises SnapshotError: one is not there
        """
        argv = ["zfs", "get", "-Hp", *_kind_of(names), "-o", "name,property,value", ",".join(wanted), *names]
        found: dict[str, dict[str, str]] = {name: {} for name in names}
        for name, key, value in _rows(self._checked(argv, _ASKING_SECONDS), 3):
            found[name][key] = value
        return found

    def exists(self, name: str) -> bool:
        """Whether there is a file system, volume, snapshot or bookmark of that name.

        :raises SnapshotError: it cannot be said
        """
        argv = ["zfs", "get", "-Hp", *_kind_of([name]), "-o", "value", "guid", name]
        done = self._run(argv, _ASKING_SECONDS)
        if done.status and not _is_missing(done):
            raise _failure(argv, done)
        return done.status == 0

    def ours(self, pools: Iterable[str] = ()) -> list[Ours]:
        """What we have made, in these pools or in all: what bears our properties itself. What was made below or of it
        by others inherits them, and is not ours.

        :raises SnapshotError: a pool is not there
        """
        chosen = sorted(pools)
        argv = ["zfs", "get", "-H", *(["-r"] if chosen else []), "-s", "local", "-o", "name,property,value"]
        found: dict[str, dict[str, str]] = {}
        for name, key, value in _rows(self._checked([*argv, f"{KIND},{PLAN}", *chosen], _ASKING_SECONDS), 3):
            found.setdefault(name, {})[key] = value
        return [Ours(name, has[KIND], has[PLAN]) for name, has in sorted(found.items()) if KIND in has and PLAN in has]

    def bearing(self, key: str) -> set[str]:
        """The names of all that bear a property themselves, in all pools."""
        argv = ["zfs", "get", "-H", "-s", "local", "-o", "name", key]
        return set(self._checked(argv, _ASKING_SECONDS).splitlines())

    def names(self) -> list[str]:
        """The names of all file systems, volumes and snapshots."""
        argv = ["zfs", "list", "-H", "-t", "filesystem,volume,snapshot", "-o", "name"]
        return self._checked(argv, _ASKING_SECONDS).splitlines()

    def pools(self) -> Mapping[str, str]:
        """The health of each pool, such as ``ONLINE``."""
        return dict(_rows(self._checked(["zpool", "list", "-H", "-o", "name,health"], _ASKING_SECONDS), 2))

    def sync(self, pool: str) -> None:
        """Bring to the pool what was written, so that a snapshot need not wait for it. Blocks.

        :raises SnapshotError: it does not take it, or hangs
        """
        self._checked(["zpool", "sync", pool], _CHANGING_SECONDS)

    def outlast(self, plan: str, pools: Iterable[str]) -> None:
        """Wait for the end of commands that a vmsnap which died has given for a plan: what they make would come into
        being after it was found not to be there. Blocks.

        :raises SnapshotError: one does not end, or a pool is not there or hangs
        """
        self.runner.await_others(PLAN, plan)
        for pool in pools:
            # The command is gone, and zfs-fuse may still be at it: another change waits for the transactions before.
            if self.flavour().fuse:
                self.change("inherit", _NOBODYS, pool)
            elif os.geteuid() == 0:
                self.sync(pool)

    def change(self, *arguments: str) -> None:
        """Give a command that changes something. Blocks.

        :raises SnapshotError: it failed
        """
        self._checked(["zfs", *arguments], _CHANGING_SECONDS, changes=True)

    def snapshot(self, seconds: float, plan: str, names: Sequence[str]) -> None:
        """Make snapshots for a plan, all at one instant, which zfs-fuse can of one only.

        :raises SnapshotError: it failed, or took longer
        """
        self._checked(["zfs", "snapshot", *marked("snapshot", plan), *names], seconds, changes=True)

    def hold(self, plan: str, names: Sequence[str]) -> None:
        """See to it that nobody else removes snapshots, by a hold that is called as the plan is.

        :raises SnapshotError: it failed
        """
        self.change("hold", plan, *names)

    def remove_snapshot(self, plan: str, name: str, *, cloned: bool) -> None:
        """Remove a snapshot that we have made for the plan; idempotent. Where it is `cloned` by us it goes with the
        last clone.

        :raises SnapshotInUse: somebody else holds it
        :raises SnapshotError: it cannot be removed
        """
        argv = ["zfs", "release", plan, name]
        done = self._run(argv, _CHANGING_SECONDS, changes=True)
        if done.status and "no such tag" not in done.stderr and not _is_missing(done):
            raise _failure(argv, done)
        self._destroy("-d", name)
        if not cloned and self.exists(name):
            raise SnapshotInUse(
                f"{name} is held or cloned by somebody else, and goes when that ends", cure=f"see: zfs holds {name}"
            )

    def remove(self, name: str) -> None:
        """Remove a file system, a volume or a bookmark; idempotent. What is in use for a moment is waited for.

        :raises SnapshotError: it cannot be removed
        """
        self._destroy(name)

    def changes_since(self, bookmark: str, snapshot: str) -> AbstractContextManager[IO[bytes]]:
        """The stream of what has changed between two instants; see `stream.find`."""
        argv = ["zfs", "send", "--large-block", "--compressed", "-i", bookmark, snapshot]
        return self.runner.stream(argv, _SENDING_SECONDS)

    def _destroy(self, *arguments: str) -> None:
        argv = ["zfs", "destroy", *arguments]
        deadline = time.monotonic() + _BUSY_SECONDS
        while (done := self._run(argv, _CHANGING_SECONDS, changes=True)).status:
            if _is_missing(done):
                return
            # udev looks at a volume that is new, whoever read it has closed it just now
            if "busy" not in done.stderr or time.monotonic() > deadline:
                raise _failure(argv, done)
            time.sleep(_POLL_SECONDS)

    def _checked(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> str:
        done = self._run(argv, seconds, changes=changes)
        if done.status:
            raise _failure(argv, done)
        return done.stdout

    def _run(self, argv: Sequence[str], seconds: float, *, changes: bool = False) -> Output:
        try:
            return self.runner.run(argv, seconds, changes=changes)
        except DriverUnavailable as e:
            raise DriverUnavailable(e.message, cure=INSTALL) from e


def marked(kind: str, plan: str) -> tuple[str, ...]:
    """The arguments that say, from the moment at which it exists, that something is ours."""
    return "-o", f"{KIND}={kind}", "-o", f"{PLAN}={plan}"


def pool_of(name: str) -> str:
    """The pool in which that lies."""
    return re.split("[/@#]", name, maxsplit=1)[0]


def lineage(name: str) -> list[str]:
    """The data set and all that it lies in, from its pool on: each may have a quota that counts for it."""
    words = name.split("/")
    return ["/".join(words[:count]) for count in range(1, len(words) + 1)]


def _is_missing(done: Output) -> bool:
    """Whether what a command was about is not there. Each kind of thing has words of its own."""
    return bool(re.search(r"does not exist|no such pool or dataset|could not find any snapshots", done.stderr))


def _kind_of(names: Sequence[str]) -> tuple[str, ...]:
    """Bookmarks are told of to those alone who ask for them; zfs-fuse has no such question."""
    return ("-t", "bookmark") if any("#" in name for name in names) else ()


def _rows(text: str, columns: int) -> list[list[str]]:
    return [line.split("\t", columns - 1) for line in text.splitlines() if line.count("\t") >= columns - 1]


def _failure(argv: Sequence[str], done: Output) -> SnapshotError:
    said = one_line(done.stderr) or one_line(done.stdout) or f"status {done.status}"
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, said, re.IGNORECASE)), "")
    if not cure and os.geteuid():
        cure = _CURES[0][1]
    kind = SnapshotInUse if argv[1] == "destroy" and _IN_USE.search(said) else SnapshotError
    return kind(f"{' '.join(argv[:2])} failed: {said}", cure=cure)
