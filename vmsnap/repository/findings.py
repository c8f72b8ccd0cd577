"""What a check has found: what is wrong, in which object, and what of which backups it touches."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

from vmsnap.errors import DamageFound
from vmsnap.repository.format import CONFIG_KEY

DAMAGE = "damage"
"""Something is not what was written."""
LOST = "lost"
"""A backup lacks something for good, and its manifest says so."""
NOTE = "note"
"""Worth knowing; no backup loses anything."""

_RANGES_KEPT = 1000


@dataclass(frozen=True)
class Touched:
    """What of a backup is lost: `part` is ``disk vda``, ``memory pc.ram``, ``device state`` or, where the manifest
    itself is damaged, ``all``; `offset` is where the first lost range begins, `lost_bytes` how much is lost in all.
    `ranges` are the lost ranges as offset and length; the first thousand, where there are more.
    """

    backup: str
    part: str
    offset: int = 0
    lost_bytes: int = 0
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CheckFinding:
    """One thing that is not as it should be. `object` is the key of the stored object, or empty where it is unknown
    which one it would be. `severity`: ``damage``; ``lost`` for what a backup lacks for good and its manifest notes; or
    ``note`` where no backup loses anything.
    """

    object: str
    severity: str
    message: str
    touches: tuple[Touched, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What a check has found, and how much it has looked at: `packs` are there, `read_packs` of them were read whole,
    chosen as `subset` says, or all where it is empty.
    """

    backups: int
    packs: int
    read_bytes: int
    findings: tuple[CheckFinding, ...]
    read_packs: int = 0
    subset: str = ""

    @property
    def damaged(self) -> bool:
        """Whether anything is damaged, or lacks something."""
        return any(finding.severity != NOTE for finding in self.findings)

    def raise_if_damaged(self) -> None:
        """Raise what was found as one error.

        :raises DamageFound: there is damage; the message names the first one and the backups that it touches
        """
        damages = [finding for finding in self.findings if finding.severity != NOTE]
        if damages:
            touched = sorted({f"{touch.backup}: {touch.part}" for finding in damages for touch in finding.touches})
            more = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
            repairable = any(finding.severity == DAMAGE for finding in damages)
            raise DamageFound(
                f"{damages[0].message}{more}; touches {', '.join(touched) or 'no backup'}",
                cure="vmsnap repair saves what can be saved" if repairable else "",
            )


@dataclass(frozen=True)
class RepairReport:
    """What a repair has found and done, or would do where `dry_run`.

    `findings` is what was wrong, `actions` what was changed, a line each for people; none for a repository that is
    whole. `lost` says what backups have lost for good, `unreadable` names backups (in lower case) of which nothing can
    be read. `whole_again` are backups that had lost something and lack nothing now. `waits_for` describes the sessions
    after whose end ``vmsnap gc`` deletes what was damaged.
    """

    dry_run: bool
    backups: int
    packs: int
    read_bytes: int
    findings: tuple[CheckFinding, ...]
    actions: tuple[str, ...]
    lost: tuple[Touched, ...]
    unreadable: tuple[str, ...]
    whole_again: tuple[str, ...]
    waits_for: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was, or would be, changed."""
        return bool(self.actions)

    def raise_if_lost(self) -> None:
        """Raise what could not be saved as one error.

        :raises DamageFound: something is lost; the message names the backups
        """
        if self.lost or self.unreadable:
            names = [*self.unreadable, *sorted({touch.backup for touch in self.lost})]
            raise DamageFound(
                f"not all could be saved of {', '.join(names)}",
                cure="every other backup is whole; --accept-loss restores what is left of these",
            )


class Findings:
    """Collects what is found, by what is wrong, and what each touches. May be used by several threads at once."""

    def __init__(self) -> None:
        self._touches: dict[tuple[str, str, str], dict[tuple[str, str], _Ranges]] = {}
        self._lock = Lock()

    def add(
        self,
        key: str,
        message: str,
        touches: tuple[str, str] | None = None,
        offset: int = 0,
        length: int = 0,
        *,
        severity: str = DAMAGE,
    ) -> None:
        """Note that `message` is so of the object `key`, and that it costs that range of a part of a backup.

        :param touches: backup and part; None where nothing is known to be touched
        """
        with self._lock:
            parts = self._touches.setdefault((key, severity, message), {})
            if touches:
                parts.setdefault(touches, _Ranges()).add(offset, length)

    def drop_backup(self, backup: str) -> None:
        """Forget what touches a backup: it does not exist any more."""
        with self._lock:
            for parts in self._touches.values():
                for touched in [touched for touched in parts if touched[0] == backup]:
                    del parts[touched]

    def all(self) -> tuple[CheckFinding, ...]:
        """Everything, in the order in which it was found first."""
        return tuple(
            CheckFinding(key, severity, message, tuple(ranges.touched(*part) for part, ranges in parts.items()))
            for (key, severity, message), parts in self._touches.items()
        )


class _Ranges:
    """Ranges of one image, neighbours joined, in bounded memory."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._bytes = 0
        self._ranges: list[tuple[int, int]] = []

    def add(self, offset: int, length: int) -> None:
        self._first = offset if self._first is None else min(self._first, offset)
        self._bytes += length
        if self._ranges and sum(self._ranges[-1]) == offset:
            start, before = self._ranges[-1]
            self._ranges[-1] = (start, before + length)
        elif length and len(self._ranges) < _RANGES_KEPT:
            self._ranges.append((offset, length))

    def touched(self, backup: str, part: str) -> Touched:
        # Several threads may have found them, in any order.
        ranges: list[tuple[int, int]] = []
        for offset, length in sorted(self._ranges):
            if ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
            else:
                ranges.append((offset, length))
        return Touched(backup, part, self._first or 0, self._bytes, tuple(ranges))


def object_in(message: str) -> str:
    """The key of the object that the message of an error begins with; empty where it begins with none."""
    word = message.split(" ", 1)[0].strip("'\",:")
    return word if "/" in word or word == CONFIG_KEY else ""
