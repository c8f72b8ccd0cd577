"""What a snapshot has left in a running QEMU when the record of its plan is lost with vmsnap's state folder: its nodes
are found by their names, and by their files the copy of the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vmsnap.model import OwnedResource
from vmsnap_drivers.snapshots.qcow2 import record
from vmsnap_drivers.snapshots.qcow2.graph import BlockGraph
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
    nodes = graph.call("query-named-block-nodes", {"flat": True})
    files = {found[1]: path for node in nodes if (path := _path(node)) and (found := _NODE.fullmatch(_name(node)))}
    for short in sorted({found[1] for node in nodes if (found := _NODE.fullmatch(_name(node)))}):
        path = files.get(short)
        match = _FILE.fullmatch(path.name) if path else None
        if path is None or match is None:
            yield OwnedResource(KIND, short, short, MECHANISM)
        elif not (state_folder / f"{match[1]}.json").exists():
            copy = path.with_name(f"{match[1]}{COPY_SUFFIX}")
            name = str(copy) if record.read_copy(copy) is not None else short
            yield OwnedResource(KIND, name, match[1], MECHANISM)


def _name(node: dict[str, object]) -> str:
    return str(node.get("node-name", ""))


def _path(node: dict[str, object]) -> Path | None:
    name = str(node.get("file", ""))
    return Path(name) if name.startswith("/") else None
