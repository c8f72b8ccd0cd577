"""Live backup of whole running virtual machines: vCPU, RAM and every disk from one instant, in milliseconds of pause.

The library gives the verbs of the command line, typed, without a process::

    import vmsnap

    repository = vmsnap.open_repository("file:///backups", passphrase="…")
    with vmsnap.Controller() as controller:
        result = controller.backup("web1", repository)

Errors are those of `vmsnap.errors`; driver authors import `vmsnap.roles` and inherit from `vmsnap.testing`. Names are
imported when they are first used, so that ``import vmsnap`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsnap.controller import (
        BackupResult,
        BootResult,
        ConsolidateResult,
        Controller,
        DuplicateInfo,
        FailoverResult,
        Progress,
        RecoveryResult,
        RestoreResult,
    )
    from vmsnap.export import export_disks
    from vmsnap.host import HostFolders
    from vmsnap.places import create_repository, open_repository
    from vmsnap.repository.copying import CopyReport, copy_backups

__version__ = "0.1.0"

__all__ = [
    "BackupResult",
    "BootResult",
    "ConsolidateResult",
    "Controller",
    "CopyReport",
    "DuplicateInfo",
    "FailoverResult",
    "HostFolders",
    "Progress",
    "RecoveryResult",
    "RestoreResult",
    "__version__",
    "copy_backups",
    "create_repository",
    "export_disks",
    "open_repository",
]

_HOMES = {
    "BackupResult": "vmsnap.controller",
    "BootResult": "vmsnap.controller",
    "ConsolidateResult": "vmsnap.controller",
    "Controller": "vmsnap.controller",
    "CopyReport": "vmsnap.repository.copying",
    "DuplicateInfo": "vmsnap.controller",
    "FailoverResult": "vmsnap.controller",
    "HostFolders": "vmsnap.host",
    "Progress": "vmsnap.controller",
    "RecoveryResult": "vmsnap.controller",
    "RestoreResult": "vmsnap.controller",
    "copy_backups": "vmsnap.repository.copying",
    "create_repository": "vmsnap.places",
    "export_disks": "vmsnap.export",
    "open_repository": "vmsnap.places",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
