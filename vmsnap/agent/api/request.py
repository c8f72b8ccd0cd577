"""What every request for a verb has, and how its values become words of a command line.

Values never become options by themselves: each stands behind its own option in one word, or behind ``--``. What would
let the caller name a file on the host or a driver's option is the administrator's, whatever the verb.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from vmsnap.agent.tokens import ADMIN

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of a VM")]
Backup = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the whole id of a backup")]
Tag = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]{0,199}$")]
Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9#@_][A-Za-z0-9#@_ .:,;+=()\[\]-]{0,199}$")]
HostPath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f]{0,1000}$", description="on the agent's host")]
Lun = Annotated[str, Field(pattern=r"^iscsi://[A-Za-z0-9.:\[\]-]{1,100}/[A-Za-z0-9.:-]{1,223}/[0-9]{1,5}$")]
Url = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f-][^\x00-\x20\x7f]{0,999}$")]
Options = dict[
    Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")],
    Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{0,1000}$")],
]
Seconds = Annotated[float, Field(gt=0, le=86400)]
LongSeconds = Annotated[int, Field(gt=0, le=100 * 366 * 86400)]
Count = Annotated[int, Field(ge=0, le=100_000)]
Tags = Annotated[list[Tag], Field(max_length=20)]


class Request(BaseModel):
    """What all verbs have: the repository, which must be one that the agent is set up with; default: the configured
    one.
    """

    model_config = ConfigDict(extra="forbid")
    verb: ClassVar[str] = ""
    uses_repository: ClassVar[bool] = True

    repository: Url | None = Field(None, description="one of those that the agent works with")

    def needs(self) -> str:
        """The role that may ask for this."""
        return ADMIN

    def words(self) -> list[str]:
        """The command line's words behind the verb."""
        return []

    def about(self) -> str:
        """The VM that it works on; empty for none or many."""
        return ""

    def other_repositories(self) -> list[str]:
        """Those that it uses beside its own; the agent must work with them too."""
        return []

    def arguments(self) -> tuple[str, ...]:
        """The whole command line, without the repository."""
        return (*self.verb.split("-"), *self.words())


class LimitedRequest(Request):
    """One that moves much to the repository or from it."""

    limit_rate_bytes: Annotated[int, Field(ge=1, le=1 << 50)] | None = Field(
        None, description="in a second, to the repository and as many from it"
    )

    def arguments(self) -> tuple[str, ...]:
        """See `Request`."""
        verb, words = self.verb.split("-"), self.words()
        return (*verb, *([f"--limit-rate={self.limit_rate_bytes}"] if self.limit_rate_bytes else []), *words)


def each(option: str, values: Iterable[object]) -> list[str]:
    """The same option for each value."""
    return [f"{option}={value}" for value in values]


def flags(**given: bool) -> list[str]:
    """The options without a value that were given."""
    return [f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given]


def driver_options(options: Options) -> list[str]:
    """Options of a driver."""
    return [f"-o{key}={value}" for key, value in options.items()]
