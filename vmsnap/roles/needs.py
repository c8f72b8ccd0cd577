"""What a driver needs of the host, declared once: ``vmsnap drivers`` looks for it without making the driver, and asks
nobody but the file system.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

_MORE_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where programs lie that PATH need not lead to for users other than root."""


@dataclass(frozen=True)
class Program:
    """One of these programs on PATH, or in a folder of the system's own programs. `cure` says how it is got."""

    names: tuple[str, ...]
    cure: str

    def lack(self) -> str:
        """What is missing, as a clause; empty where it is there."""
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE_FOLDERS))
        if any(shutil.which(name, path=path) for name in self.names):
            return ""
        return f"{' or '.join(self.names)} is not on PATH"


@dataclass(frozen=True)
class Module:
    """A module of Python that can be imported. `cure` says how it is got."""

    name: str
    cure: str

    def lack(self) -> str:
        """What is missing, as a clause; empty where it is there. The module itself is not imported."""
        try:
            found = find_spec(self.name) is not None
        except (ImportError, ValueError):  # of a folder above it, or of one that was half imported
            found = False
        return "" if found else f"the Python module {self.name} is not installed"


Need = Program | Module
"""Each has `lack` and `cure`."""
