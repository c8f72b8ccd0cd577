"""Options of a driver: declared once, checked, shown by ``vmsnap drivers show`` and in the help of its console
script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One option of a driver, given as ``-o name=value``.

    `choices` limits the values; `default` is what the driver takes without it (None: nothing); `required` refuses
    its absence.
    """

    name: str
    help: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True)
class DriverContext:
    """What a driver of this host is told about it.

    `state_dir` (0700) outlives the host's restart; a driver keeps what it must keep in ``state_dir/<driver name>/``.
    `memory_dir` (0700) lies on tmpfs: RAM images go there, never anywhere else unless `spool_dir` is set, which the
    user does to allow guest RAM on a disk. `memory_budget_bytes` bounds what all images in `memory_dir` may take
    together (None: what tmpfs has free). Disks of duplicates are made below `duplicates_dir` (None: a folder of
    `state_dir`).
    """

    state_dir: Path
    memory_dir: Path
    spool_dir: Path | None = None
    memory_budget_bytes: int | None = None
    duplicates_dir: Path | None = None

    def folder_of_duplicate(self, name: str) -> Path:
        """Where the disks of the duplicate `name` lie."""
        return (self.duplicates_dir or self.state_dir / "duplicates") / name


def check_options(driver: str, declared: Sequence[Option], given: Mapping[str, str]) -> dict[str, str]:
    """The options `given`, completed by the defaults.

    :raises UsageError: an unknown option, a value that is no choice, a required option that is missing
    """
    known = {option.name: option for option in declared}
    for name, value in given.items():
        if name not in known:
            raise UsageError(
                f"driver {driver!r} has no option {name!r}",
                cure=f"it knows: {', '.join(sorted(known)) or 'none'}; see: vmsnap drivers show {driver}",
            )
        if known[name].choices and value not in known[name].choices:
            raise UsageError(
                f"option {name}={value!r} of driver {driver!r} is no choice",
                cure=f"choose one of: {', '.join(known[name].choices)}",
            )
    for option in declared:
        if option.required and option.name not in given:
            raise UsageError(f"driver {driver!r} needs -o {option.name}=…", cure=option.help)
    defaults = {option.name: option.default for option in declared if option.default is not None}
    return defaults | dict(given)
