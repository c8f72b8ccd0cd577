"""Options of a driver: declared once, with their types, checked before the driver is made, shown by ``vmsnap drivers
show`` and in the help of its console script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsnap.errors import UsageError
from vmsnap.roles.option_types import TEXT, OptionType


@dataclass(frozen=True)
class Option:
    """One option of a driver, given as ``-o name=value``.

    `help` says what it means. `type` is what its values are, and `choices` limits them; `default` is what the driver
    takes without it (None: nothing); `required` refuses its absence. A default or a choice that is none of the
    type's values is a mistake of the driver's author, and raises ValueError where it is declared.
    """

    name: str
    help: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    type: OptionType[Any] = TEXT

    def __post_init__(self) -> None:
        for text in (*self.choices, *(() if self.default is None else (self.default,))):
            if problem := self.problem_with(text):
                raise ValueError(f"option {self.name!r} is declared with a value that {problem}")

    @property
    def metavar(self) -> str:
        """What stands for a value in the help."""
        return "|".join(self.choices) if self.choices else self.type.metavar

    def problem_with(self, text: str) -> str:
        """Why `text` is no value of this option, as the end of a sentence; empty where it is one."""
        if self.choices and text not in self.choices:
            return "is no choice"
        try:
            self.type.convert(text)
        except ValueError:
            return f"is no {self.type.meaning}"
        return ""


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


def with_defaults(declared: Sequence[Option], given: Mapping[str, str]) -> dict[str, str]:
    """The options `given`, completed by the defaults; nothing is checked. Without a default there is no value."""
    return {option.name: option.default for option in declared if option.default is not None} | dict(given)


def check_options(driver: str, declared: Sequence[Option], given: Mapping[str, str]) -> dict[str, str]:
    """The options `given`, completed by the defaults.

    :raises UsageError: an unknown option, a value that is no choice or not of its type, a required option that is
        missing
    """
    known = {option.name: option for option in declared}
    for name, value in given.items():
        if name not in known:
            raise UsageError(
                f"driver {driver!r} has no option {name!r}",
                cure=f"it knows: {', '.join(sorted(known)) or 'none'}; see: vmsnap drivers show {driver}",
            )
        option = known[name]
        if problem := option.problem_with(value):
            choose = f"choose one of: {', '.join(option.choices)}" if option.choices else ""
            example = f"write -o {name}={option.default}, for example" if option.default else option.help
            raise UsageError(f"option {name}={value!r} of driver {driver!r} {problem}", cure=choose or example)
    for option in declared:
        if option.required and option.name not in given:
            raise UsageError(f"driver {driver!r} needs -o {option.name}=…", cure=option.help)
    return with_defaults(declared, given)
