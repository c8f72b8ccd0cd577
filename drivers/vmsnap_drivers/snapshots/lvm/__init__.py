"""The mechanism ``lvm``: snapshots of logical volumes, thick and thin."""

from vmsnap_drivers.snapshots.lvm.mechanism import LvmMechanism

__all__ = ["LvmMechanism"]
