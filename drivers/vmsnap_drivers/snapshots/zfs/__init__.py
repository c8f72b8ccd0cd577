"""The mechanism ``zfs``: snapshots of volumes, and of image files in file systems, of ZFS."""

from vmsnap_drivers.snapshots.zfs.mechanism import ZfsMechanism

__all__ = ["ZfsMechanism"]
