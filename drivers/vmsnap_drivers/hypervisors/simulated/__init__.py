"""The simulated hypervisor: VMs that are processes of their own, with RAM, disks and a network they really use.

It needs nothing but Python and Linux, and is as strict as a real one: what is captured at two instants does not agree
after it was loaded, and the guest says so.
"""

from vmsnap_drivers.hypervisors.simulated.driver import SimulatedHypervisor

__all__ = ["SimulatedHypervisor"]
