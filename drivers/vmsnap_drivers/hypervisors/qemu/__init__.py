"""The hypervisor driver "qemu"."""

from vmsnap_drivers.hypervisors.qemu.driver import QemuHypervisor

__all__ = ["QemuHypervisor"]
