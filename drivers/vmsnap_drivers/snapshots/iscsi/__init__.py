"""The mechanism ``iscsi``: disks that are LUNs, snapshotted by what lies behind them and exported anew."""

from vmsnap_drivers.snapshots.iscsi.mechanism import IscsiMechanism

__all__ = ["IscsiMechanism"]
