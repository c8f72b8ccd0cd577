"""An emulator for domains whose raw disks have no node of their format, as newer libvirts start them: that of the
tests, 9.0, always makes one. It runs another emulator, without those nodes.

Their names go to the nodes of the files, so that all that this libvirt asks and does by name finds them. (The newer
ones use the name of the file's node.) Runs by itself, beside a link `REAL` to the emulator: imports nothing of the
lab's.
"""

import json
import os
import shutil
import sys
from pathlib import Path

REAL = "real-emulator"


def write_emulator(folder: Path, emulator: Path) -> Path:
    """Put it into the folder, for QEMU's user too; returns its path."""
    path = folder / "emulator"
    text = Path(__file__).read_text()
    path.write_text(f"#!/usr/bin/python3 -I\n{text}")
    path.chmod(0o755)
    (folder / REAL).unlink(missing_ok=True)
    (folder / REAL).symlink_to(shutil.which(str(emulator)) or emulator)
    return path


def without_raw_nodes(argv: list[str]) -> list[str]:
    """The command line without the ``-blockdev`` of raw nodes; what refers to them gets the file's node."""
    nodes = {place: json.loads(argv[place + 1]) for place, word in enumerate(argv) if word == "-blockdev"}
    raw = {node["file"]: node for node in nodes.values() if node["driver"] == "raw" and isinstance(node["file"], str)}
    changed = list(argv)
    for place, node in sorted(nodes.items(), reverse=True):
        if above := raw.get(node["node-name"]):
            node.pop("auto-read-only", None)
            above = {key: value for key, value in above.items() if key not in ("driver", "file")}
            changed[place + 1] = json.dumps({**node, **above})
        elif node in raw.values():
            del changed[place : place + 2]
    return changed


if __name__ == "__main__":
    real = os.path.realpath(Path(__file__).with_name(REAL))
    os.execv(real, [real, *without_raw_nodes(sys.argv[1:])])
