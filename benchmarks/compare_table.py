"""The steps of the comparison, what was measured in them, and the table of medians and ratios that comes of it."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.document import markdown_table
from benchmarks.tools import PlainVmsnap, Tool, Vmsnap

_OTHERS = ("restic", "borg")
"""What the targets are measured against."""
_OURS = Vmsnap.name


class Step(enum.Enum):
    """What is measured, in this order."""

    FIRST = "first backup"
    UNCHANGED = "unchanged, all read"
    UNCHANGED_CACHED = "the same, image in the page cache"
    UNCHANGED_TOLD = "unchanged, told so"
    CHANGED_TOLD = "1 % changed, told where"
    CHANGED = "1 % changed, all read"
    RESTORE = "restore to a raw file"

    @property
    def of_changed_image(self) -> bool:
        """Whether it is about the second image."""
        return self in (Step.CHANGED, Step.CHANGED_TOLD, Step.RESTORE)

    def done_by(self, tool: Tool) -> bool:
        """Whether that tool does it: only vmsnap can be told what has changed."""
        return tool.name == _OURS or self not in (Step.UNCHANGED_TOLD, Step.CHANGED_TOLD)


@dataclass(frozen=True)
class Sample:
    """One run of one step."""

    step: Step
    tool: str
    seconds: float
    processor_seconds: float
    peak_bytes: int
    added_bytes: int

    def __str__(self) -> str:
        return f"{self.tool}: {self.step.value}: {self.seconds:.1f} s, +{self.added_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class Result:
    """All of one run."""

    machine: str
    versions: tuple[str, ...]
    size_bytes: int
    allocated_bytes: int
    """Of the image's file: all but its holes."""
    file_bytes: int
    changed_bytes: int
    disk_seconds: tuple[float, ...]
    """What reading the image from the disk takes alone, in each round."""
    loads: tuple[float, ...]
    """How many threads the machine ran or wanted to run, in the minute before the end of each sample."""
    samples: tuple[Sample, ...]

    @property
    def rounds(self) -> int:
        """How often everything was done."""
        return len(self.disk_seconds)

    def joined(self, later: Result) -> Result:
        """This and the rounds of a later run, as one.

        :raises SystemExit: they are not of the same machine, tools and image
        """
        if replace(self, disk_seconds=(), loads=(), samples=()) != replace(
            later, disk_seconds=(), loads=(), samples=()
        ):
            raise SystemExit("the earlier run is of another machine, image or version")
        return replace(
            self,
            disk_seconds=self.disk_seconds + later.disk_seconds,
            loads=self.loads + later.loads,
            samples=self.samples + later.samples,
        )

    def of(self, step: Step, tool: str) -> list[Sample]:
        """The samples of one step of one tool, in the order of the rounds; empty where it does not do it."""
        return [sample for sample in self.samples if sample.step is step and sample.tool == tool]


def write_result(result: Result, path: Path) -> None:
    """Write all measurements to a file, as JSON."""
    path.write_text(json.dumps(asdict(result), indent=1, default=lambda step: step.value) + "\n")


def read_result(path: Path) -> Result:
    """What `write_result` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


@dataclass(frozen=True)
class _Target:
    text: str
    least: float | None
    """None: nobody set one."""
    ratios: Callable[[Result], list[float]]
    """One for each round."""

    def row(self, result: Result) -> list[str] | None:
        ratios = sorted(self.ratios(result))
        if not ratios:
            return None
        middle = median(ratios)
        met = "" if self.least is None else "met" if middle >= self.least else "**not met**"
        least = "" if self.least is None else f"{self.least:.3g}"
        return [self.text, least, f"{middle:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}", met]


def table(result: Result) -> str:
    """What goes into the documentation."""
    return "\n\n".join([_heading(result), _times(result), _sizes(result), _costs(result), _targets(result)])


def _heading(result: Result) -> str:
    disk_seconds = median(result.disk_seconds)
    return (
        f"{', '.join(result.versions)}; {result.machine}. An image of {_gib(result.size_bytes)}, "
        f"{_gib(result.allocated_bytes)} of it no holes, {_gib(result.file_bytes)} of it files; then "
        f"{result.changed_bytes / 1e6:.0f} MB of it changed. Medians of {result.rounds} rounds; MB/s are of what is no "
        f"hole. Only reading the image from the disk takes {disk_seconds:.1f} s "
        f"({result.allocated_bytes / disk_seconds / 1e6:.0f} MB/s). The load of the machine was "
        f"{min(result.loads):.1f} to {max(result.loads):.1f}, the tools' own included."
    )


def _times(result: Result) -> str:
    def cell(samples: list[Sample]) -> str:
        seconds = median(sample.seconds for sample in samples)
        return f"{seconds:.1f} s ({result.allocated_bytes / seconds / 1e6:.0f} MB/s)"

    return markdown_table(["time", *_tools(result)], _rows(result, list(Step), cell))


def _sizes(result: Result) -> str:
    def cell(samples: list[Sample]) -> str:
        return f"{median(sample.added_bytes for sample in samples) / 1e6:.1f} MB"

    steps = [step for step in Step if step not in (Step.RESTORE, Step.UNCHANGED_CACHED)]
    return markdown_table(["added to the repository", *_tools(result)], _rows(result, steps, cell))


def _costs(result: Result) -> str:
    def memory(samples: list[Sample]) -> str:
        return f"{max(sample.peak_bytes for sample in samples) / (1 << 20):.0f} MiB"

    def processor(samples: list[Sample]) -> str:
        return f"{median(sample.processor_seconds for sample in samples):.1f} s"

    steps = [Step.FIRST, Step.UNCHANGED, Step.RESTORE]
    return "\n\n".join(
        (
            markdown_table(["peak memory", *_tools(result)], _rows(result, steps, memory)),
            markdown_table(["processor time", *_tools(result)], _rows(result, steps, processor)),
        )
    )


def _targets(result: Result) -> str:
    rows = [row for target in _TARGETS if (row := target.row(result))]
    return markdown_table(["how vmsnap compares", "target", "median", "rounds", ""], rows)


def _rows(result: Result, steps: Sequence[Step], cell: Callable[[list[Sample]], str]) -> list[list[str]]:
    tools = _tools(result)
    return [
        [step.value, *(cell(samples) if (samples := result.of(step, tool)) else "" for tool in tools)] for step in steps
    ]


def _tools(result: Result) -> list[str]:
    return list(dict.fromkeys(sorted((sample.tool for sample in result.samples), key=_order)))


def _order(tool: str) -> tuple[bool, bool, str]:
    return not tool.startswith(_OURS), tool not in _OTHERS, tool.replace("restic", "a")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"


def _faster(ours: Step, theirs: Step) -> Callable[[Result], list[float]]:
    """How many times as fast as the faster of the others, round by round."""

    def ratios(result: Result) -> list[float]:
        others = [result.of(theirs, tool) for tool in _OTHERS]
        rounds = zip(result.of(ours, _OURS), *(samples for samples in others if samples), strict=False)
        return [min(other.seconds for other in rest) / mine.seconds for mine, *rest in rounds if rest]

    return ratios


def _smaller(result: Result) -> list[float]:
    """The smaller of the others' repositories over ours."""
    others = [result.of(Step.FIRST, tool) for tool in _OTHERS]
    rounds = zip(result.of(Step.FIRST, _OURS), *(samples for samples in others if samples), strict=False)
    return [min(other.added_bytes for other in rest) / mine.added_bytes for mine, *rest in rounds if rest]


def _encrypted(step: Step) -> Callable[[Result], list[float]]:
    """The speed with encryption over that without."""

    def ratios(result: Result) -> list[float]:
        rounds = zip(result.of(step, _OURS), result.of(step, PlainVmsnap.name), strict=False)
        return [plain.seconds / mine.seconds for mine, plain in rounds]

    return ratios


_TARGETS = (
    _Target("first backup: speed over the faster one's", 1.5, _faster(Step.FIRST, Step.FIRST)),
    _Target("first backup: the smaller one's size over ours", 1 / 1.05, _smaller),
    _Target("unchanged, all read from the disk: speed", 3.0, _faster(Step.UNCHANGED, Step.UNCHANGED)),
    _Target(
        "unchanged, all read from the page cache: speed", 3.0, _faster(Step.UNCHANGED_CACHED, Step.UNCHANGED_CACHED)
    ),
    _Target("unchanged, told so: speed", 20.0, _faster(Step.UNCHANGED_TOLD, Step.UNCHANGED)),
    _Target("1 % changed, told where: speed", None, _faster(Step.CHANGED_TOLD, Step.CHANGED)),
    _Target("restore: speed", 1.5, _faster(Step.RESTORE, Step.RESTORE)),
    _Target("first backup: encrypted over plain speed", 0.8, _encrypted(Step.FIRST)),
    _Target("restore: encrypted over plain speed", 0.8, _encrypted(Step.RESTORE)),
)
