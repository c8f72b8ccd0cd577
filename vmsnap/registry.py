"""Finds drivers by name, through stevedore, in this one place; its failures become errors of ours.

Entry-point groups: ``vmsnap.hypervisors``, ``vmsnap.snapshot_mechanisms``, ``vmsnap.storage_backends`` (whose names
are URL schemes).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsnap.errors import DriverUnavailable

if TYPE_CHECKING:
    from vmsnap.roles import Hypervisor, SnapshotMechanism, StorageBackend

HYPERVISORS = "vmsnap.hypervisors"
SNAPSHOT_MECHANISMS = "vmsnap.snapshot_mechanisms"
STORAGE_BACKENDS = "vmsnap.storage_backends"

GROUPS = {"hypervisor": HYPERVISORS, "snapshot mechanism": SNAPSHOT_MECHANISMS, "storage backend": STORAGE_BACKENDS}
"""What people call a driver of a group, and the group."""


@dataclass(frozen=True)
class Lack:
    """Something that a driver needs and this host has not, and how it is got."""

    what: str
    cure: str


@dataclass(frozen=True)
class InstalledDriver:
    """One entry point of one of the groups. `problem` says why it cannot be loaded, or in what it does not keep to its
    role; empty where nothing is wrong. `missing`: what it needs here and there is not.
    """

    kind: str
    name: str
    distribution: str
    version: str
    driver: type[Any] | None
    problem: str = ""
    missing: tuple[Lack, ...] = ()


def hypervisor(name: str) -> type[Hypervisor]:
    """The hypervisor driver called `name`.

    :raises DriverUnavailable: unknown, named by two distributions, failing to import, or no `Hypervisor`
    """
    from vmsnap.roles import Hypervisor

    driver: type[Hypervisor] = _load(HYPERVISORS, "hypervisor", name, Hypervisor)
    return driver


def snapshot_mechanism(name: str) -> type[SnapshotMechanism]:
    """The snapshot mechanism called `name`; raises as `hypervisor` does."""
    from vmsnap.roles import SnapshotMechanism

    driver: type[SnapshotMechanism] = _load(SNAPSHOT_MECHANISMS, "snapshot mechanism", name, SnapshotMechanism)
    return driver


def storage_backend(scheme: str) -> type[StorageBackend]:
    """The storage backend for URLs of `scheme`; raises as `hypervisor` does."""
    from vmsnap.roles import StorageBackend

    driver: type[StorageBackend] = _load(STORAGE_BACKENDS, "storage backend", scheme, StorageBackend)
    return driver


def names(group: str) -> list[str]:
    """The names of the installed drivers of a group, sorted; nothing is imported."""
    return sorted({point.name for point in _entry_points(group)})


def mechanism_names() -> list[str]:
    """The names of the installed snapshot mechanisms in the order in which they are asked whether they take a disk:
    first those that take it for what it lies on. One that cannot be loaded is told of by whoever asks it.
    """

    def asked_later(name: str) -> bool:
        try:
            return not snapshot_mechanism(name).asked_first
        except DriverUnavailable:
            return True

    return sorted(names(SNAPSHOT_MECHANISMS), key=lambda name: (asked_later(name), name))


def installed() -> list[InstalledDriver]:
    """All drivers of all groups, each loaded by itself, so that a broken one is shown and takes no other down."""
    from vmsnap.roles import Hypervisor, SnapshotMechanism, StorageBackend

    roles: dict[str, type[Any]] = {
        "hypervisor": Hypervisor,
        "snapshot mechanism": SnapshotMechanism,
        "storage backend": StorageBackend,
    }
    found = []
    for kind, group in GROUPS.items():
        for point in sorted(_entry_points(group), key=lambda point: point.name):
            driver, problem = None, ""
            try:
                driver = _load(group, kind, point.name, roles[kind])
            except DriverUnavailable as e:
                problem = e.message
            distribution = (point.dist and point.dist.name) or "?"
            version = (point.dist and point.dist.version) or "?"
            missing = () if driver is None else _lacks(driver)
            found.append(InstalledDriver(kind, point.name, distribution, version, driver, problem, missing))
    return found


def _lacks(driver: type[Any]) -> tuple[Lack, ...]:
    return tuple(Lack(what, need.cure) for need in driver.needs if (what := need.lack()))


def _entry_points(group: str) -> list[Any]:
    import importlib.metadata

    return list(importlib.metadata.entry_points(group=group))


def _load(group: str, kind: str, name: str, role: type[Any]) -> type[Any]:
    from stevedore.driver import DriverManager
    from stevedore.exception import MultipleMatches, NoMatches
    from stevedore.extension import ExtensionManager

    points = _entry_points(group)
    if name not in {point.name for point in points}:
        raise DriverUnavailable(
            f"no {kind} driver {name!r} is installed",
            cure=f"installed: {', '.join(names(group)) or 'none'}; install the package that brings it",
        )
    # stevedore 5.10 would ask its cache on disk, whose key has time stamps of two minutes' grain (stevedore/_cache.py):
    # a driver that was just installed would not be found.
    ExtensionManager.ENTRY_POINT_CACHE[group] = points
    failures: list[BaseException] = []

    def remember(_manager: object, _entry_point: object, error: BaseException) -> None:
        failures.append(error)

    try:
        manager: Any = DriverManager(group, name, invoke_on_load=False, on_load_failure_callback=remember)
    except MultipleMatches as e:
        packages = sorted(str(point.dist.name if point.dist else point.value) for point in points if point.name == name)
        raise DriverUnavailable(
            f"two installed packages name a {kind} driver {name!r}", cure=f"uninstall one of: {', '.join(packages)}"
        ) from e
    except SystemExit as e:  # a module that ends the process is no reason for ours to end
        raise _broken(kind, name, e) from e
    except NoMatches:
        raise _broken(kind, name, failures[0]) from failures[0]
    if failures:
        raise _broken(kind, name, failures[0]) from failures[0]
    plugin: Any = manager.extensions[0].plugin
    if not (inspect.isclass(plugin) and issubclass(plugin, role)):
        raise DriverUnavailable(f"{kind} driver {name!r} is broken: {plugin!r} is no {role.__name__}")
    from vmsnap.roles.signatures import breaches

    if found := breaches(plugin, role, name):
        raise DriverUnavailable(f"{kind} driver {name!r} is broken: {'; '.join(found)}")
    return plugin


def _broken(kind: str, name: str, error: BaseException) -> DriverUnavailable:
    if isinstance(error, DriverUnavailable):
        return error
    cure = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        cure = f"install what it needs, perhaps: pip install 'vmsnap[{name}]'"
    text = " ".join(str(error).split())
    return DriverUnavailable(f"{kind} driver {name!r} cannot be loaded: {type(error).__name__}: {text}", cure=cure)
