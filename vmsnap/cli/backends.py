"""The console scripts of the drivers: the same commands, the driver preset, its options shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap import __version__
from vmsnap.cli.lazy import CommandLine, LazyCommand
from vmsnap.cli.main import BACKUPS, COMMANDS
from vmsnap.cli.options import driver_options
from vmsnap.cli.session import DriverCommand, Session, pass_session, write_driver_options, write_options
from vmsnap.cli.version import version_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsnap.model import SeenVm

MACHINES = "Machines"
PLACES = "Commands"

_WITH_VMS = {name: command for name, command in COMMANDS.items() if name != "demo"}


class HypervisorCommandLine(CommandLine):
    """The console script of one hypervisor; its help shows the driver's options."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The driver's options, then the examples."""
        write_driver_options(ctx, formatter)
        super().format_epilog(ctx, formatter)


class StorageCommandLine(CommandLine):
    """The console script of one storage backend; its help shows the backend's options."""

    def __init__(self, name: str, scheme: str, **attributes: Any) -> None:
        super().__init__(name, _PLACE_COMMANDS, params=[version_option(__version__)], **attributes)
        self._scheme = scheme

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The backend's options, then the examples."""
        from vmsnap import registry

        write_options(formatter, self._scheme, registry.storage_backend)
        super().format_epilog(ctx, formatter)


class MechanismCommandLine(CommandLine):
    """The console script of one snapshot mechanism; its help shows the mechanism's options."""

    def __init__(self, name: str, mechanism: str, **attributes: Any) -> None:
        super().__init__(name, _MECHANISM_COMMANDS, params=[version_option(__version__)], **attributes)
        self._mechanism = mechanism

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The mechanism's options, then the examples."""
        from vmsnap import registry

        write_options(formatter, self._mechanism, registry.snapshot_mechanism)
        super().format_epilog(ctx, formatter)


@click.command("list-vms", cls=DriverCommand, epilog="vmsnap-qemu list-vms")
@driver_options
@pass_session
def list_vms(session: Session, options: dict[str, str]) -> None:
    """List the VMs that the driver sees on this host, registered or not."""
    from vmsnap.cli.seenvms import entries, show

    with session.controller() as controller:
        registered = {row.vm for row in controller.vms() if row.hypervisor == session.hypervisor}
        document = entries(_seen(session, options), registered, controller.drivers)
    session.emit(document, lambda: show(document))


def _seen(session: Session, options: dict[str, str]) -> Sequence[SeenVm]:
    from dataclasses import replace

    from vmsnap import registry
    from vmsnap.roles import check_options

    driver = registry.hypervisor(session.hypervisor or "")
    # What reaches one VM is not needed to look for all of them.
    declared = [replace(option, required=False) for option in driver.options]
    instance = driver("list-vms", session.folders().context(), check_options(driver.name, declared, options))
    try:
        return instance.see_vms()
    finally:
        instance.close()


vmsnap_qemu = HypervisorCommandLine(
    "vmsnap-qemu",
    {
        "list-vms": LazyCommand("vmsnap.cli.backends:list_vms", "List the QEMU VMs of this host.", MACHINES),
        **_WITH_VMS,
    },
    hypervisor="qemu",
    params=[version_option(__version__)],
    help="vmsnap for VMs that QEMU runs, reached by their QMP sockets.",
    epilog="""\
        vmsnap-qemu vm add web1 -o qmp=/run/web1.qmp
        vmsnap-qemu doctor web1
        vmsnap-qemu backup web1 -r /srv/backups""",
)
"""The entry point ``vmsnap-qemu``."""

vmsnap_libvirt = HypervisorCommandLine(
    "vmsnap-libvirt",
    {
        "list-vms": LazyCommand("vmsnap.cli.backends:list_vms", "List the domains of a libvirt.", MACHINES),
        **_WITH_VMS,
    },
    hypervisor="libvirt",
    params=[version_option(__version__)],
    help="vmsnap for domains of libvirt.",
    epilog="""\
        vmsnap-libvirt list-vms
        vmsnap-libvirt vm add web1
        vmsnap-libvirt backup web1 -r /srv/backups""",
)
"""The entry point ``vmsnap-libvirt``."""

vmsnap_sim = HypervisorCommandLine(
    "vmsnap-sim",
    {
        "start": LazyCommand("vmsnap.cli.simulated:start", "Start a simulated VM and register it.", MACHINES),
        "stop": LazyCommand("vmsnap.cli.simulated:stop", "Shut a simulated VM down.", MACHINES),
        "list": LazyCommand("vmsnap.cli.simulated:list_running", "List the simulated VMs.", MACHINES),
        "list-vms": LazyCommand("vmsnap.cli.backends:list_vms", "List them as every driver does.", MACHINES),
        **{name: command for name, command in COMMANDS.items() if name != "list"},
        "backups": LazyCommand("vmsnap.cli.listing:list_backups", "List the backups.", BACKUPS),
    },
    hypervisor="simulated",
    params=[version_option(__version__)],
    help="vmsnap for simulated VMs: real processes with RAM, disks and a workload, to try everything out.",
    epilog="""\
        vmsnap-sim start vm001 --memory 64M --disk 256M
        vmsnap-sim backup vm001 -r /srv/backups
        vmsnap-sim stop vm001""",
)
"""The entry point ``vmsnap-sim``."""

_PLACE_COMMANDS = {
    "init": LazyCommand("vmsnap.cli.storage:init", "Make a repository.", PLACES),
    "list": LazyCommand("vmsnap.cli.storage:list_backups", "List its backups.", PLACES),
    "check": LazyCommand("vmsnap.cli.storage:check", "Check it.", PLACES),
    "doctor": LazyCommand("vmsnap.cli.storage:doctor", "Say whether the place can be used.", PLACES),
    "bench": LazyCommand("vmsnap.cli.storage:bench", "Measure how fast the place is.", PLACES),
}

vmsnap_local = StorageCommandLine(
    "vmsnap-local",
    "file",
    help="vmsnap repositories in folders of this host, or of anything that is mounted on it.",
    epilog="""\
        vmsnap-local init /srv/backups
        vmsnap-local bench file:///srv/backups""",
)
"""The entry point ``vmsnap-local``."""

vmsnap_s3 = StorageCommandLine(
    "vmsnap-s3",
    "s3",
    help="vmsnap repositories in buckets of any service that speaks S3; credentials are found as boto3 finds them.",
    epilog="""\
        vmsnap-s3 doctor s3://bucket/prefix -o endpoint=https://s3.example.com
        vmsnap-s3 init s3://bucket/prefix
        vmsnap-s3 bench s3://bucket/prefix --size 512M""",
)
"""The entry point ``vmsnap-s3``."""

vmsnap_sftp = StorageCommandLine(
    "vmsnap-sftp",
    "sftp",
    help="vmsnap repositories on SFTP servers; hosts, keys and known hosts are those of OpenSSH.",
    epilog="""\
        vmsnap-sftp doctor sftp://vault@far.example/srv/backups
        vmsnap-sftp init sftp://vault@far.example/srv/backups
        vmsnap-sftp bench sftp://vault@far.example/srv/backups --size 512M""",
)
"""The entry point ``vmsnap-sftp``."""

_MECHANISM_COMMANDS = {
    "snapshot": LazyCommand("vmsnap.cli.mechanisms:snapshot", "Take a snapshot of disks.", PLACES),
    "list": LazyCommand("vmsnap.cli.mechanisms:list_snapshots", "List the snapshots.", PLACES),
    "clone": LazyCommand("vmsnap.cli.mechanisms:clone", "Make writable disks of a snapshot.", PLACES),
    "delete": LazyCommand("vmsnap.cli.mechanisms:delete", "Delete a snapshot, or clones of one.", PLACES),
    "doctor": LazyCommand("vmsnap.cli.mechanisms:doctor", "Say whether the mechanism works here.", PLACES),
}

vmsnap_lvm = MechanismCommandLine(
    "vmsnap-lvm",
    "lvm",
    help="Snapshots of logical volumes, as vmsnap takes them of the disks of VMs.",
    epilog="""\
        vmsnap-lvm doctor
        vmsnap-lvm snapshot /dev/vg0/web1 /dev/vg0/web1-data
        vmsnap-lvm list""",
)
"""The entry point ``vmsnap-lvm``."""

vmsnap_zfs = MechanismCommandLine(
    "vmsnap-zfs",
    "zfs",
    help="Snapshots of volumes and image files of ZFS, as vmsnap takes them of the disks of VMs.",
    epilog="""\
        vmsnap-zfs doctor
        vmsnap-zfs snapshot /dev/zvol/tank/web1 /tank/images/web1-data.img
        vmsnap-zfs list""",
)
"""The entry point ``vmsnap-zfs``."""

vmsnap_iscsi = MechanismCommandLine(
    "vmsnap-iscsi",
    "iscsi",
    help="Snapshots of LUNs, taken where they lie and exported anew, as vmsnap takes them of the disks of VMs.",
    epilog="""\
        vmsnap-iscsi doctor
        vmsnap-iscsi snapshot iscsi://127.0.0.1/iqn.2009-12.com.example:001/1
        vmsnap-iscsi list""",
)
"""The entry point ``vmsnap-iscsi``."""
