"""The three roles that a driver can take, and what they share.

A driver is a class that implements one of `Hypervisor`, `SnapshotMechanism` and `StorageBackend` and is named by an
entry point of the role's group. What every driver may rely on, whatever its role:

- It is made by vmsnap with options that were checked against its `options`; making it does no I/O and cannot fail.
- It is used by one thread at a time.
- Its methods raise `vmsnap.errors.VmsnapError` and its children, each message one line that names the thing.

What every driver must do: never retry (wrappers do), never log or return secrets, never know another driver.
"""

from vmsnap.roles.diskwriter import DiskWriter
from vmsnap.roles.hypervisor import CaptureRequest, Hypervisor, LoadedVm, LoadRequest
from vmsnap.roles.needs import Module, Need, Program
from vmsnap.roles.option_types import PATH, SIZE, TEXT, YES_NO, OptionType, number, seconds, whole_number
from vmsnap.roles.options import DriverContext, Option, check_options, with_defaults
from vmsnap.roles.snapshot import DiskReader, SnapshotMechanism
from vmsnap.roles.storage import ObjectInfo, StorageBackend, StorageProperties, check_key
from vmsnap.roles.wrapping import WrappedStorage

__all__ = [
    "PATH",
    "SIZE",
    "TEXT",
    "YES_NO",
    "CaptureRequest",
    "DiskReader",
    "DiskWriter",
    "DriverContext",
    "Hypervisor",
    "LoadRequest",
    "LoadedVm",
    "Module",
    "Need",
    "ObjectInfo",
    "Option",
    "OptionType",
    "Program",
    "SnapshotMechanism",
    "StorageBackend",
    "StorageProperties",
    "WrappedStorage",
    "check_key",
    "check_options",
    "number",
    "seconds",
    "whole_number",
    "with_defaults",
]
