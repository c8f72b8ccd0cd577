"""Makes driver instances for the controller: by name, with checked options, for this host."""

from __future__ import annotations

from collections.abc import Mapping

from vmsnap import registry
from vmsnap.roles import DriverContext, Hypervisor, SnapshotMechanism, check_options, with_defaults


class Drivers:
    """Where the controller gets its drivers from. Tests inherit it to wrap what it makes in a fault-injecting
    driver.
    """

    def __init__(
        self, context: DriverContext, mechanism_options: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """`mechanism_options`: for each snapshot mechanism its options from the configuration."""
        self.context = context
        self._mechanism_options = mechanism_options or {}

    def hypervisor(self, name: str, vm: str, options: Mapping[str, str]) -> Hypervisor:
        """A hypervisor driver for one VM.

        :raises DriverUnavailable: there is no such driver
        :raises UsageError: an option is wrong
        """
        driver = registry.hypervisor(name)
        return driver(vm, self.context, check_options(name, driver.options, options))

    def hypervisor_of_host(self, name: str, purpose: str) -> Hypervisor:
        """A hypervisor driver for what concerns no registered VM, with the defaults of its options; `purpose` stands
        where the VM's name would.

        :raises DriverUnavailable: there is no such driver
        """
        driver = registry.hypervisor(name)
        return driver(purpose, self.context, with_defaults(driver.options, {}))

    def mechanism(self, name: str) -> SnapshotMechanism:
        """A snapshot mechanism; raises as `hypervisor` does."""
        driver = registry.snapshot_mechanism(name)
        return driver(self.context, check_options(name, driver.options, self._mechanism_options.get(name, {})))

    def mechanism_names(self) -> list[str]:
        """The snapshot mechanisms that can be had, in the order in which they are asked whether they handle a disk."""
        return registry.mechanism_names()
