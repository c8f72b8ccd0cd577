"""The mechanism ``qcow2``: point-in-time copies of disks by QEMU's own block layer, for raw and qcow2 alike."""

from vmsnap_drivers.snapshots.qcow2.mechanism import Qcow2Mechanism

__all__ = ["Qcow2Mechanism"]
