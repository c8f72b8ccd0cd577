"""vmsnap, restic and borg on the same disk image, in one run; the table goes into docs/performance.md.

    sh benchmarks/install.sh; python -m benchmarks.compare [--gib 8] [--rounds 3] [--folder /var/tmp] [--docs]

Each step is done by each tool in turn, the first one another in each round; each run is a process of its own, begins
with its files out of the page cache (but for one step, which begins with the image in it), and ends when all that it
wrote is on the disk. Needs about seven times the image's size in `--folder`. Without ``--docs`` the table is printed
only.

Where a machine is quiet for minutes at a time only, each round can be a call of its own: ``--rounds 1 --json FILE
--images FOLDER``, the next ones with ``--after FILE`` in addition, which takes the rounds of the earlier ones into
table and file. ``--rounds 0`` makes the images, or a table of what was measured before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.compare_table import Result, Sample, Step, read_result, table, write_result
from benchmarks.disk_image import DiskImageFile, copy_changed, make_image
from benchmarks.document import host, replace_section
from benchmarks.processes import Took, drop_from_cache, read_all
from benchmarks.tools import Borg, PlainVmsnap, Restic, Tool, TunedBorg, Vmsnap
from vmsnap.model import Extent

_TOOLS: dict[str, type[Tool]] = {tool.name: tool for tool in (Vmsnap, PlainVmsnap, Restic, Borg, TunedBorg)}


def main() -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args()
    earlier = read_result(options.after) if options.after else None
    with tempfile.TemporaryDirectory(prefix="vmsnap-compare-", dir=options.folder) as name:
        folder = Path(name)
        # In a process of its own: the kernel would count this one's memory to the tools.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
            images = maker.submit(images_in, options.images or folder, int(options.gib * 1024) << 20).result()
        comparison = Comparison(folder, *images, [_TOOLS[tool] for tool in options.tools])
        done = earlier.rounds if earlier else 0
        for number in range(options.rounds):
            comparison.round(done + number, partial(_say, f"round {number + 1} of {options.rounds}:"))
    if earlier and options.rounds:
        result = earlier.joined(comparison.result(host()))
    elif earlier:
        result = earlier
    elif options.rounds:
        result = comparison.result(host())
    else:
        return 0
    text = table(result)
    print(text)
    if options.json:
        write_result(result, options.json)
    if options.docs:
        replace_section("compare", text)
    return 0


def images_in(folder: Path, size_bytes: int) -> tuple[DiskImageFile, Path, list[Extent]]:
    """The image, the changed one, and where that is changed: as an earlier call has made them, or made now."""
    noted, second = folder / "images.json", folder / "disk2.img"
    if noted.exists():
        sizes, changed = msgspec.json.decode(noted.read_bytes(), type=tuple[list[int], list[Extent]])
        if sizes[0] == size_bytes:
            return DiskImageFile(folder / "disk1.img", *sizes), second, changed
    _say(f"making an image of {size_bytes / (1 << 30):g} GiB")
    folder.mkdir(parents=True, exist_ok=True)
    noted.unlink(missing_ok=True)
    first = make_image(folder / "disk1.img", size_bytes)
    changed = copy_changed(first.path, second)
    noted.write_bytes(msgspec.json.encode(((first.size_bytes, first.file_bytes, first.allocated_bytes), changed)))
    return first, second, changed


class Comparison:
    """All measurements of one run."""

    def __init__(
        self, folder: Path, first: DiskImageFile, second: Path, changed: Sequence[Extent], tools: Sequence[type[Tool]]
    ) -> None:
        """:param folder: for the repositories and what is restored"""
        self._folder = folder
        self._first = first
        self._second = second
        self._changed = changed
        self._tools = tools
        self._samples: list[Sample] = []
        self._disk_seconds: list[float] = []
        self._loads: list[float] = []

    def round(self, number: int, tell: Callable[[str], None]) -> None:
        """Every step once with every tool, in repositories that are new. Blocks for minutes."""
        place = self._folder / f"round{number}"
        tools = [made(place / made.name.replace(", ", "-").replace(" ", "-")) for made in self._tools]
        turned = tools[number % len(tools) :] + tools[: number % len(tools)]
        try:
            drop_from_cache(self._first.path)
            self._disk_seconds.append(read_all(self._first.path))
            for tool in turned:
                tool.init()
            for step in Step:
                for tool in turned:
                    if step.done_by(tool):
                        # Told where the change is: in a copy, so that the backup that reads all finds it new as well.
                        self._take(step, tool.copied() if step is Step.CHANGED_TOLD else tool)
                        tell(str(self._samples[-1]))
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def result(self, machine: str) -> Result:
        """What was measured."""
        changed_bytes = sum(extent.length for extent in self._changed)
        versions = tuple(dict.fromkeys(tool.version() for tool in self._tools))
        return Result(
            machine,
            versions,
            self._first.size_bytes,
            self._first.allocated_bytes,
            self._first.file_bytes,
            changed_bytes,
            tuple(self._disk_seconds),
            tuple(self._loads),
            tuple(self._samples),
        )

    def _take(self, step: Step, tool: Tool) -> None:
        image = self._second if step.of_changed_image else self._first.path
        before = tool.stored_bytes()
        drop_from_cache(image, tool.repository)
        if step is Step.UNCHANGED_CACHED:
            read_all(image)
        if step is Step.RESTORE:
            took, restored = tool.restore()
            _require_same(restored, self._second)
            shutil.rmtree(tool.restored)
        else:
            took = self._back_up(step, tool, image)
        added = tool.stored_bytes() - before
        self._loads.append(os.getloadavg()[0])
        self._samples.append(Sample(step, tool.name, took.seconds, took.processor_seconds, took.peak_bytes, added))

    def _back_up(self, step: Step, tool: Tool, image: Path) -> Took:
        if step is Step.UNCHANGED_TOLD and isinstance(tool, Vmsnap):
            return tool.backup_changed(image, [])
        if step is Step.CHANGED_TOLD and isinstance(tool, Vmsnap):
            return tool.backup_changed(image, self._changed)
        return tool.backup(image)


def _require_same(restored: Path, original: Path) -> None:
    """:raises SystemExit: the tool did not bring back what it was given"""
    with restored.open("rb") as one, original.open("rb") as other:
        while piece := one.read(8 << 20):
            if piece != other.read(len(piece)):
                raise SystemExit(f"{restored} differs from {original}")
        if other.read(1):
            raise SystemExit(f"{restored} is shorter than {original}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="vmsnap, restic and borg on the same disk image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--gib", type=float, default=8, help="the size of the image")
    add("--rounds", type=int, default=3)
    add("--folder", type=Path, default=Path("/var/tmp"), help="for images and repositories")
    add("--images", type=Path, metavar="FOLDER", help="keep the images there, and use those that are there")
    add("--tools", nargs="+", choices=list(_TOOLS), default=list(_TOOLS))
    add("--json", type=Path, metavar="FILE", help="write all measurements there")
    add("--after", type=Path, metavar="FILE", help="what --json wrote in an earlier run on the same machine")
    add("--docs", action="store_true", help="write the table into docs/performance.md")
    return parser


def _say(*words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {' '.join(words)} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
