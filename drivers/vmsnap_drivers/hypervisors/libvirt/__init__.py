"""The hypervisor driver for VMs that libvirt runs."""

from vmsnap_drivers.hypervisors.libvirt.driver import LibvirtHypervisor

__all__ = ["LibvirtHypervisor"]
