"""``vmsnap-sim start``, ``stop`` and ``list``: the processes of simulated VMs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmsnap.cli import output
from vmsnap.cli.options import size_option
from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.configuration import parse_size
from vmsnap.errors import AlreadyExists, UnknownVm, UsageError

if TYPE_CHECKING:
    from vmsnap.controller import Controller
    from vmsnap.vmtable import VmRow

HYPERVISOR = "simulated"
DEFAULT_DISK_BYTES = 256 << 20


@click.command(
    cls=SessionCommand,
    epilog="""\
        vmsnap-sim start vm001 --memory 64M --disk 256M
        vmsnap-sim start vm001 --disk 256M --disk /srv/images/data.img""",
)
@click.argument("name")
@size_option("--memory", "memory_bytes", default="64M", help="Its RAM.")
@click.option(
    "--disk",
    "disks",
    metavar="SIZE|PATH",
    multiple=True,
    help="A disk: a size, or the path of an image; any number of times. Default: those it had, or one of 256M.",
)
@click.option("--bridge", metavar="NAME", default="br0", show_default=True, help="The virtual bridge it is on.")
@click.option(
    "--ticks", metavar="PER_SECOND", type=float, default=100.0, show_default=True, help="How busy the guest is."
)
@click.option("--ignore-power-button", "deaf", is_flag=True, help="A guest that does not shut down when it is asked.")
@pass_session
def start(
    session: Session, name: str, memory_bytes: int, disks: tuple[str, ...], bridge: str, ticks: float, deaf: bool
) -> None:
    """Start the simulated VM NAME as a process of its own, and register it.

    It works until it is stopped: it counts in RAM and on its disks, and checks that they agree.
    """
    from vmsnap.cli.vm import vm_document
    from vmsnap_drivers.hypervisors.simulated import lifecycle

    with session.controller() as controller:
        known = _known(controller, name)
        if known is not None and known.hypervisor != HYPERVISOR:
            raise AlreadyExists(f"VM {name!r} is registered with hypervisor {known.hypervisor!r}")
        state_dir = controller.folders.state_dir
        loaded = lifecycle.start(
            name,
            memory_bytes,
            [_disk(text) for text in disks] or _former_disks(known) or [DEFAULT_DISK_BYTES],
            state_dir / "vms" / name,
            state_dir=state_dir,
            bridge=bridge,
            ticks_per_second=ticks,
            deaf=deaf,
        )
        try:
            controller.table.remove(name)
            row = controller.add_vm(name, HYPERVISOR, loaded.options)
        except BaseException:
            lifecycle.stop(Path(loaded.options["socket"]), force=True)
            raise
    session.emit(vm_document(row), lambda: click.echo(f"{name} executes, its socket is {loaded.options['socket']}"))


@click.command(cls=SessionCommand, epilog="vmsnap-sim stop vm001")
@click.argument("name")
@click.option("--force", is_flag=True, help="End its process at once, as a power cut would.")
@pass_session
def stop(session: Session, name: str, force: bool) -> None:
    """Shut the simulated VM NAME down in order. Its disks stay, and it stays registered."""
    from vmsnap_drivers.hypervisors.simulated import lifecycle, record

    with session.controller() as controller:
        known = _known(controller, name)
        if known is not None and known.hypervisor != HYPERVISOR:
            raise UsageError(f"VM {name!r} is no simulated VM", cure="see: vmsnap-sim list")
        socket = known.options.get("socket") if known else None
        path = Path(socket) if socket else lifecycle.socket_of(controller.folders.state_dir, name)
        try:
            lifecycle.stop(path, force=force)
        except UnknownVm:
            raise UnknownVm(f"no simulated VM {name!r} runs", cure="see: vmsnap-sim list") from None
        finally:
            if not record.alive(path):
                controller.table.set_state(name, "absent")
    session.emit({"vm": name, "state": "absent"}, lambda: click.echo(f"{name} has stopped"))


@click.command("list", cls=SessionCommand, epilog="vmsnap-sim list")
@pass_session
def list_running(session: Session) -> None:
    """List the simulated VMs whose processes run, restored ones too, and those that were killed."""
    from vmsnap_drivers.hypervisors.simulated import lifecycle

    found = lifecycle.list_vms(session.folders().state_dir)
    document = [{"vm": vm.vm, "state": vm.state, "socket": str(vm.socket), "loaded": vm.loaded} for vm in found]
    rows = [(vm.vm, vm.state, "restored" if vm.loaded else "started", vm.socket) for vm in found]
    session.emit(document, lambda: output.table(("vm", "state", "origin", "socket"), rows))


def _known(controller: Controller, name: str) -> VmRow | None:
    try:
        return controller.table.get(name)
    except UnknownVm:
        return None


def _disk(text: str) -> int | Path:
    try:
        return parse_size(text)
    except UsageError:
        path = Path(text)
        if not path.is_file():
            raise UsageError(f"{text!r} is neither a size nor an image file", cure="write 256M, or a path") from None
        return path


def _former_disks(known: VmRow | None) -> list[int | Path]:
    return [Path(disk.address) for disk in known.disks] if known else []
