"""The migration settings of a QEMU: what they were, what a capture needs, and back again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmsnap_drivers.qemu.monitor import Monitor

UNLIMITED_BYTES_PER_SECOND: Final = 1 << 40


@dataclass(frozen=True)
class Settings:
    """Migration capabilities and the parameters that a capture changes, as they were before it."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]

    @classmethod
    def read(cls, monitor: Monitor) -> Settings:
        """Ask QEMU."""
        capabilities = {
            entry["capability"]: bool(entry["state"]) for entry in monitor.execute("query-migrate-capabilities")
        }
        parameters = monitor.execute("query-migrate-parameters")
        changed = ("max-bandwidth", "downtime-limit", "tls-creds", "mode")
        return cls(capabilities, {name: parameters[name] for name in changed if name in parameters})


def apply(monitor: Monitor, before: Settings, wanted: Collection[str], downtime_ms: int) -> None:
    """Turn on the `wanted` capabilities and no other, and let the stream run as fast as it can.

    :raises MonitorError: QEMU does not have a capability, or refuses it for this VM
    """
    _set_capabilities(monitor, before.capabilities, {name: name in wanted for name in before.capabilities})
    parameters: dict[str, Any] = {"max-bandwidth": UNLIMITED_BYTES_PER_SECOND, "downtime-limit": downtime_ms}
    if before.parameters.get("tls-creds"):
        parameters["tls-creds"] = ""
    if before.parameters.get("mode", "normal") != "normal":
        parameters["mode"] = "normal"
    monitor.execute("migrate-set-parameters", parameters)


def restore(monitor: Monitor, before: Settings) -> None:
    """Set back what `apply` changed; idempotent."""
    now = Settings.read(monitor)
    _set_capabilities(monitor, now.capabilities, before.capabilities)
    different = {name: value for name, value in before.parameters.items() if now.parameters.get(name) != value}
    if different:
        monitor.execute("migrate-set-parameters", different)


def _set_capabilities(monitor: Monitor, now: Mapping[str, bool], wanted: Mapping[str, bool]) -> None:
    """Off before on, each kind in one command: several capabilities exclude one another."""
    for state in (False, True):
        changes = [
            {"capability": name, "state": state}
            for name, value in wanted.items()
            if value is state and now.get(name) is not state
        ]
        if changes:
            monitor.execute("migrate-set-capabilities", {"capabilities": changes})
