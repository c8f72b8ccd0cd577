"""Steps of cleaning up that do not keep the others from being taken."""

from __future__ import annotations

from collections.abc import Callable

from vmsnap.errors import SnapshotError


def attempt(step: Callable[[], object]) -> list[SnapshotError]:
    """Take a step; its failure is returned in words for the user, not raised: the caller goes on, and tells."""
    try:
        step()
    except SnapshotError as e:
        return [e]
    except OSError as e:
        return [SnapshotError(f"{e.filename} could not be removed: {e.strerror}")]
    return []
