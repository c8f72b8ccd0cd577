"""Distributions as users get them: built wheels in an environment that has nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copy_of(source: Path, folder: Path) -> Path:
    """A copy of what git has, or would have, of the distribution in `source`; building leaves things behind."""
    copy = folder / f"source-{source.name}"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    for name in listing.stdout.decode().split("\0"):
        if name and (source / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((source / name).read_bytes())
    return copy


def build(source: Path, folder: Path) -> Path:
    """The wheel of the distribution in `source`, built as those who publish it do."""
    target, copy = folder / f"wheel-{source.name}", copy_of(source, folder)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(copy)], check=True, capture_output=True
    )
    return next(target.glob("*.whl"))


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment that knows neither this tree nor the environment that the tests run in."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> CleanEnvironment:
        """An empty one."""
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        return cls(folder)

    def program(self, name: str) -> str:
        """The path of an installed program."""
        return str(self.folder / "bin" / name)

    def build(self, *sources: Path) -> list[str]:
        """The wheels of these distributions, built with what is installed here: setuptools must be."""
        target = self.folder / "wheels"
        copies = [str(copy_of(source, self.folder)) for source in sources]
        argv = [self.program("python"), "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*argv, "--no-build-isolation", "--wheel-dir", str(target), *copies],
            capture_output=True,
            text=True,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr
        return sorted(map(str, target.glob("*.whl")))

    def install(self, *what: str) -> None:
        """``pip install``, as a user would give it."""
        argv = [self.program("python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *what]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    def run(
        self, argv: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in `folder`; its failure is the caller's to look at."""
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = f"{self.folder / 'bin'}:{clean['PATH']}"
        return subprocess.run(
            [self.program(argv[0]), *argv[1:]],
            cwd=folder,
            env={**clean, "PATH": path, **(variables or {})},
            capture_output=True,
            text=True,
        )
