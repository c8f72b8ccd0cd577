"""What is lost of a backup and noted in its manifest: whether it still is, and who may read around it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING

from vmsnap.errors import DamageFound
from vmsnap.repository.manifest import LostRange, Manifest

if TYPE_CHECKING:
    from vmsnap.repository.repository import Repository

MAX_RANGES = 10_000
"""So many lost ranges of an image a manifest notes singly; beyond that the closest ones are noted as one."""


def is_within(ranges: Sequence[LostRange], offset: int, length: int) -> bool:
    """Whether all of a range is lost, by one of `ranges`, which are those of one image in ascending order."""
    before = bisect_right(ranges, offset, key=attrgetter("offset"))
    return before > 0 and offset + length <= ranges[before - 1].offset + ranges[before - 1].length


def joined(part: str, ranges: Iterable[tuple[int, int]]) -> tuple[LostRange, ...]:
    """Ranges in ascending order (offset, length) as they are to be noted: neighbours joined, and no more than
    `MAX_RANGES`. Joining others is harmless: what can be read inside a lost range is read.
    """
    found: list[tuple[int, int]] = []
    for offset, length in ranges:
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    if len(found) > MAX_RANGES:
        gaps = [after[0] - sum(before) for before, after in pairwise(found)]
        # The widest gaps stay.
        kept = sorted(sorted(range(len(gaps)), key=gaps.__getitem__)[-(MAX_RANGES - 1) :])
        starts = [0, *(gap + 1 for gap in kept)]
        ends = [*kept, len(found) - 1]
        found = [
            (found[first][0], sum(found[last]) - found[first][0]) for first, last in zip(starts, ends, strict=True)
        ]
    return tuple(LostRange(part, offset, length) for offset, length in found)


def accepted_losses(
    repository: Repository, manifest: Manifest, parts: Collection[str], *, accept: bool
) -> dict[str, Sequence[LostRange]]:
    """What of `parts` is noted as lost and still is, to be given to `Repository.reader`; nothing for most backups.

    A range whose content a later backup has stored again is not lost any more. Blocks.

    :param parts: those that are going to be read, named as in `Manifest.images`
    :param accept: the user takes zeros for what is lost
    :raises DamageFound: something is lost, and nobody accepted it; the message names it
    :raises StorageError: the storage failed
    """
    wanted = {lost.part for lost in manifest.lost} & set(parts)
    if not wanted:
        return {}
    from vmsnap.repository.blobs import BlobReader
    from vmsnap.repository.walk import LossWalk

    index = repository.whole_index()
    walk = LossWalk(BlobReader(repository.storage, repository.vault, index, repository.whole_index), index)
    losses: dict[str, Sequence[LostRange]] = {}
    for part, image in manifest.images:
        if part in wanted:
            noted = manifest.lost_of(part)
            found = [loss for loss in walk.losses(image) if is_within(noted, loss.offset, loss.length)]
            if found:
                losses[part] = joined(part, [(loss.offset, loss.length) for loss in found])
    if losses and not accept:
        first = next(iter(losses.values()))[0]
        count = sum(len(ranges) for ranges in losses.values())
        more = f", and {count - 1} more" if count > 1 else ""
        raise DamageFound(
            f"backup {manifest.backup} has lost {first.length} bytes of {first.part} from offset {first.offset}{more}",
            cure="--accept-loss reads zeros there",
        )
    return losses
