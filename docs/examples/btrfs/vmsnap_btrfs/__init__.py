"""vmsnap snapshots of disk images that lie in btrfs subvolumes."""

from vmsnap_btrfs.mechanism import BtrfsMechanism

__all__ = ["BtrfsMechanism"]
