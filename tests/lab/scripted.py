"""What runs scripts apart from this host: a guest, or a systemd of its own."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from .started import Started


@dataclass(frozen=True)
class Ended:
    """How a script in there ended, and what it printed."""

    status: int
    output: str


class Scripted(Started):
    """One such thing. ``results`` is the folder that both sides see, ``/run/results`` in there."""

    def __init__(self, folder: Path) -> None:
        """Describe it; nothing is started."""
        self.folder = folder
        self.results = folder / "results"

    @abstractmethod
    def begin(self, name: str, script: str) -> None:
        """Let a shell in there begin with `script`; `name` is that of its file. One at a time."""

    @abstractmethod
    def end(self, name: str, seconds: float) -> Ended:
        """Wait for the script's end.

        :raise LabError: it does not end in time, or what it runs in is gone.
        """

    @abstractmethod
    def ended(self, name: str) -> bool:
        """Whether the script has ended, or what it runs in has; then `end` does not wait."""

    def run(self, name: str, script: str, seconds: float = 120.0) -> Ended:
        """Run `script` in there to its end."""
        self.begin(name, script)
        return self.end(name, seconds)

    def output(self, name: str) -> str:
        """What the script has printed so far."""
        path = self.results / f"{name}.output"
        return path.read_text(errors="replace") if path.exists() else ""

    def last_words(self) -> str:
        """The end of what it said itself, and what it runs on."""
        texts = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
        return " | ".join(texts)
