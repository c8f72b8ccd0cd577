"""vmsnap for QEMU over its human monitor (HMP), where the guest's RAM is a shared file on tmpfs."""

from vmsnap_hmp.driver import HmpHypervisor

__all__ = ["HmpHypervisor"]
