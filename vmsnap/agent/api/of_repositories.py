"""Requests for verbs that work on a repository as a whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vmsnap.agent.api.request import LimitedRequest, LongSeconds, Request, flags
from vmsnap.agent.tokens import OPERATE


class InitRequest(Request):
    """Make a repository in an empty place; its passphrase is the agent's own."""

    verb = "init"
    encryption: Literal["none", "aes256-gcm"] | None = None

    def words(self) -> list[str]:
        """See `Request`."""
        return [f"--encryption={self.encryption}"] if self.encryption else []


class GcRequest(LimitedRequest):
    """Free the room of what no backup needs."""

    verb = "gc"
    dry_run: bool = False
    dead_after_seconds: LongSeconds | None = None

    def words(self) -> list[str]:
        """See `Request`."""
        after = [f"--dead-after={self.dead_after_seconds}s"] if self.dead_after_seconds else []
        return [*flags(dry_run=self.dry_run), *after]


class CheckRequest(LimitedRequest):
    """Check the repository."""

    verb = "check"
    read_data: bool = False
    subset: Annotated[str, Field(pattern=r"^[0-9]{1,6}(/[0-9]{1,6}|(\.[0-9]{1,6})?%)$")] | None = None

    def needs(self) -> str:
        """Operators check."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return [*flags(read_data=self.read_data), *([f"--subset={self.subset}"] if self.subset else [])]


class RepairRequest(LimitedRequest):
    """Save what can be saved of a damaged repository; with `dry_run`, only say what would be done."""

    verb = "repair"
    dry_run: bool = True
    forget_damaged: bool = False

    def words(self) -> list[str]:
        """See `Request`."""
        return flags(dry_run=self.dry_run, forget_damaged=self.forget_damaged)


class RefreshRequest(Request):
    """Bring the catalogue of backups up to date with the repository."""

    verb = "agent-refresh"
    everything: bool = False

    def needs(self) -> str:
        """Operators refresh."""
        return OPERATE

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--all"] if self.everything else []


class KeyListRequest(Request):
    """List the keys of the repository, without what they are."""

    verb = "key-list"

    def needs(self) -> str:
        """Operators may know which there are."""
        return OPERATE


class KeyRemoveRequest(Request):
    """Remove a key: its passphrase opens the repository no longer."""

    verb = "key-remove"
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]

    def words(self) -> list[str]:
        """See `Request`."""
        return ["--", self.key]


OF_REPOSITORIES: tuple[type[Request], ...] = (
    InitRequest,
    GcRequest,
    CheckRequest,
    RepairRequest,
    RefreshRequest,
    KeyListRequest,
    KeyRemoveRequest,
)
"""Without those that would make a new passphrase travel."""
