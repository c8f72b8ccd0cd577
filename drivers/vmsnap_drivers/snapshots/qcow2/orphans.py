"""What a snapshot has left in a running QEMU when the record of its plan is lost with vmsnap's state folder: its nodes
are found by their names, and by their files the copy of the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vmsnap.model import OwnedResource
from vmsnap_drivers.qemu.blocks.graph import BlockGraph
from vmsnap_drivers.snapshots.qcow2 import record
from vmsnap_drivers.snapshots.qcow2.names import COPY_SUFFIX, MECHANISM, TAG_PREFIX

KIND: Final = "block nodes"
_NODE: Final = re.compile(rf"({TAG_PREFIX}[0-9a-f]{{12}})-\d+-(?:filter|target|access|overlay|image)")
_FILE: Final = re.compile(rf"({TAG_PREFIX}.+)\.\d+\.(?:before|overlay)\.qcow2(?:\.committing|\.pivoting)?")


def find(graph: BlockGraph, state_folder: Path) -> Iterable[OwnedResource]:
    """What is in this QEMU of plans whose record is not in `state_folder`, one for each plan: the copy of its record,
    or, where that is lost too, the common part of its nodes' names.

    :raises SnapshotError: QEMU refused
    :raises VmGone: it ended
    """
    tags: dict[str, tuple[str, Path] | None] = {}
    for node in graph.call("query-named-block-nodes", {"flat": True}):
        if ours := _NODE.fullmatch(node["node-name"]):
            path = Path(node["file"])
            found = _FILE.fullmatch(path.name)  # a filter names the disk below it instead
            tags[ours[1]] = (found[1], path.parent) if found else tags.get(ours[1])
    for short, known in sorted(tags.items()):
        if known is None:
            yield OwnedResource(KIND, short, short, MECHANISM)
        elif not (state_folder / f"{known[0]}.json").exists():
            copy = known[1] / f"{known[0]}{COPY_SUFFIX}"
            name = str(copy) if record.read_copy(copy) is not None else short
            yield OwnedResource(KIND, name, known[0], MECHANISM)
