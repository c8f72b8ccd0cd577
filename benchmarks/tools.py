"""vmsnap, restic and borg behind one interface: each makes a repository, stores an image, brings it back.

All three encrypt, compress with zstd at their own default level and use their other defaults. benchmarks/install.sh
installs restic and borg.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from benchmarks.processes import Took, run, stored_bytes
from benchmarks.vmsnap_process import PASSPHRASE_VARIABLE
from vmsnap.model import Extent

_CACHE = Path(os.environ.get("VMSNAP_BENCH_CACHE", "/var/cache/vmsnap-bench"))
_PASSPHRASE = "correct horse battery staple"
_TOP = Path(__file__).resolve().parent.parent


class Tool(ABC):
    """One tool with one repository of its own in a folder of its own."""

    name = ""

    def __init__(self, folder: Path) -> None:
        """:param folder: made by `init`; repository, caches and what is restored lie in it"""
        self.folder = folder
        self.repository = folder / "repository"
        self.restored = folder / "restored"

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """What it is, for the table."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What it needs in its environment: the passphrase, and caches of its own."""

    @abstractmethod
    def init(self) -> None:
        """Make the repository; not measured."""

    @abstractmethod
    def backup(self, image: Path) -> Took:
        """Store the image, all of it read."""

    @abstractmethod
    def restore(self) -> tuple[Took, Path]:
        """Bring the newest image back as a new sparse file; the file is the caller's to remove."""

    def copied(self) -> Self:
        """The same with a copy of the repository, beside it."""
        copy = type(self)(self.folder.with_name(f"{self.folder.name}-copy"))
        shutil.copytree(self.repository, copy.repository)
        return copy

    def stored_bytes(self) -> int:
        """What the repository takes."""
        return stored_bytes(self.repository)

    def _run(self, *argv: str, written: Path | None = None, folder: Path | None = None) -> Took:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C.UTF-8", **self.environment()}
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log.txt"
        return run(argv, environment, written or self.repository, folder=folder or self.folder, log=log)


class Vmsnap(Tool):
    """vmsnap, encrypted."""

    name = "vmsnap"
    _init = "init"

    @classmethod
    def version(cls) -> str:
        """See `Tool.version`."""
        import vmsnap

        return f"vmsnap {vmsnap.__version__}"

    def environment(self) -> dict[str, str]:
        """See `Tool.environment`."""
        # As the Python of the checkout was found, so are its packages.
        kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        return {PASSPHRASE_VARIABLE: _PASSPHRASE, **kept}

    def init(self) -> None:
        """See `Tool.init`."""
        self._step(self._init)

    def backup(self, image: Path) -> Took:
        """See `Tool.backup`."""
        return self._step("backup", str(image))

    def backup_changed(self, image: Path, changed: Sequence[Extent]) -> Took:
        """Store the image, told what has changed since the backup before."""
        extents = self.folder / "changed.json"
        extents.write_text(json.dumps([(extent.offset, extent.length) for extent in changed]))
        return self._step("backup", str(image), "--changed", str(extents))

    def restore(self) -> tuple[Took, Path]:
        """See `Tool.restore`."""
        self.restored.mkdir()
        target = self.restored / "image"
        return self._step("restore", str(target), written=self.restored), target

    def _step(self, step: str, *rest: str, written: Path | None = None) -> Took:
        argv = (sys.executable, "-m", "benchmarks.vmsnap_process", step, str(self.repository), *rest)
        return self._run(*argv, written=written, folder=_TOP)


class PlainVmsnap(Vmsnap):
    """vmsnap without encryption."""

    name = "vmsnap, plain"
    _init = "plain"


class Restic(Tool):
    """restic: always encrypted, ``--compression auto`` by default. ``--force`` makes it read files that it knows."""

    name = "restic"
    _binary = str(_CACHE / "restic/root/usr/bin/restic")

    @classmethod
    def version(cls) -> str:
        """See `Tool.version`."""
        return " ".join(_output(cls._binary, "version").split()[:2])

    def environment(self) -> dict[str, str]:
        """See `Tool.environment`."""
        return {
            "RESTIC_REPOSITORY": str(self.repository),
            "RESTIC_PASSWORD": _PASSPHRASE,
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }

    def init(self) -> None:
        """See `Tool.init`."""
        self._run(self._binary, "init")

    def backup(self, image: Path) -> Took:
        """See `Tool.backup`."""
        return self._run(self._binary, "backup", "--quiet", "--force", "--host", "bench", str(image))

    def restore(self) -> tuple[Took, Path]:
        """See `Tool.restore`."""
        self.restored.mkdir()
        argv = (self._binary, "restore", "latest", "--quiet", "--sparse", "--target", str(self.restored))
        took = self._run(*argv, written=self.restored)
        return took, _only_file(self.restored)


class Borg(Tool):
    """borg, ``repokey-blake2``. ``--files-cache=disabled`` makes it read files that it knows."""

    name = "borg"
    _binary = str(_CACHE / "borg/bin/borg")
    _options: tuple[str, ...] = ()

    @classmethod
    def version(cls) -> str:
        """See `Tool.version`."""
        return _output(cls._binary, "--version").strip()

    def environment(self) -> dict[str, str]:
        """See `Tool.environment`."""
        return {
            "BORG_REPO": str(self.repository),
            "BORG_PASSPHRASE": _PASSPHRASE,
            "BORG_BASE_DIR": str(self.folder / "base"),
        }

    def init(self) -> None:
        """See `Tool.init`."""
        self._run(self._binary, "init", "--encryption", "repokey-blake2")

    def backup(self, image: Path) -> Took:
        """See `Tool.backup`."""
        options = ("--compression", "zstd", "--files-cache", "disabled", *self._options)
        return self._run(self._binary, "create", *options, "::{now:%Y%m%dT%H%M%S.%f}", str(image))

    def restore(self) -> tuple[Took, Path]:
        """See `Tool.restore`."""
        self.restored.mkdir()
        newest = _output(self._binary, "list", "--last", "1", "--short", environment=self.environment()).strip()
        argv = (self._binary, "extract", "--sparse", f"::{newest}")
        took = self._run(*argv, written=self.restored, folder=self.restored)
        return took, _only_file(self.restored)


class TunedBorg(Borg):
    """borg as its manual advises for disk images: chunks of fixed size, holes skipped."""

    name = "borg, fixed chunks"
    _options = ("--chunker-params", "fixed,1048576", "--sparse")


def _output(*argv: str, environment: dict[str, str] | None = None) -> str:
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **(environment or {})}
    return subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout


def _only_file(folder: Path) -> Path:
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    return file
