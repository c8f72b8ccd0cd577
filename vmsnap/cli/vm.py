"""``vmsnap vm``: the VM table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import driver_options, mechanism_choices
from vmsnap.cli.remote import agent_option, by_agent, client_of, report_job
from vmsnap.cli.session import DriverCommand, Session, SessionGroup, pass_session
from vmsnap.errors import UsageError

if TYPE_CHECKING:
    from vmsnap.vmtable import VmRow


@click.group(cls=SessionGroup)
def vm() -> None:
    """Register VMs, list them, remove them."""


@vm.command(
    cls=DriverCommand,
    short_help="Register a VM.",
    epilog="""\
        vmsnap vm add web1 --hypervisor qemu -o qmp=/run/web1.qmp
        vmsnap vm add web1 --hypervisor qemu -o qmp=/run/web1.qmp --mechanism disk0=qcow2""",
)
@click.argument("name")
@click.option("--hypervisor", metavar="DRIVER", help="The driver that reaches it; see: vmsnap drivers.")
@driver_options
@mechanism_choices
@agent_option
@pass_session
def add(
    session: Session, name: str, hypervisor: str | None, options: dict[str, str], mechanisms: dict[str, str]
) -> None:
    """Register the VM NAME, so that it can be backed up.

    Its hypervisor is asked what it is; the VM itself is not touched.
    """
    driver = hypervisor or session.hypervisor
    if not driver:
        raise UsageError("no hypervisor was named", cure="give --hypervisor DRIVER; see: vmsnap drivers")
    if session.agent:
        asked = {"vm": name, "hypervisor": driver, "options": options, "mechanisms": mechanisms}
        report_job(session, "vm-add", asked)
        return
    with session.controller() as controller:
        row = controller.add_vm(name, driver, options, mechanisms)
    session.emit(vm_document(row), lambda: click.echo(f"{row.vm} is registered: {row.state}, {_disks(row)}"))


@vm.command("list", short_help="List the registered VMs.")
@agent_option
@pass_session
def list_vms(session: Session) -> None:
    """List the registered VMs and duplicates, as they were when last seen."""
    if session.agent:
        found = list(client_of(session).pages("/vms", "after"))
    else:
        with session.controller() as controller:
            found = [vm_document(row) for row in controller.vms()]
    shown = [each for each in found if session.hypervisor in (None, each["hypervisor"])]

    def people() -> None:
        # A line a disk, so that the table is no wider than its longest address, which stands last.
        output.table(
            ("vm", "hypervisor", "kind", "state", "resume flag", "device", "address"),
            [line for each in shown for line in _lines(each)],
        )

    session.emit(shown, people)


@vm.command(short_help="Show one VM, its state asked now.")
@click.argument("name")
@by_agent("vm-show", lambda name: {"vm": name})
@pass_session
def show(session: Session, name: str) -> None:
    """Show the VM NAME; its hypervisor is asked for its state."""
    with session.controller() as controller:
        row = controller.vm(name)
    session.emit(vm_document(row), lambda: _show(row))


@vm.command(short_help="Strike a VM out of the table.")
@click.argument("name")
@by_agent("vm-remove", lambda name: {"vm": name})
@pass_session
def remove(session: Session, name: str) -> None:
    """Strike the VM NAME out of the table; the VM itself and its backups stay."""
    with session.controller() as controller:
        row = controller.remove_vm(name)
    session.emit(vm_document(row), lambda: click.echo(f"{row.vm} is no longer registered"))


def vm_document(row: VmRow) -> dict[str, Any]:
    """A row of the VM table as JSON shows it."""
    return {
        "vm": row.vm,
        "hypervisor": row.hypervisor,
        "state": row.state,
        "resume_flag": row.resume_flag,
        "disks": [{"device": disk.device, "address": disk.address, "mechanism": disk.mechanism} for disk in row.disks],
        "options": dict(row.options),
        "kind": row.kind,
        "duplicate_of": row.duplicate_of,
    }


def _show(row: VmRow) -> None:
    output.fields(
        [
            ("vm", row.vm),
            ("hypervisor", row.hypervisor),
            *((f"-o {name}", value) for name, value in row.options.items()),
            ("state", row.state),
            ("resume flag", int(row.resume_flag)),
            ("kind", _kind(row.kind, row.duplicate_of)),
        ]
    )
    click.echo()
    output.table(
        ("device", "address", "mechanism"), [(disk.device, disk.address, disk.mechanism or "-") for disk in row.disks]
    )


def _lines(each: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """A row of the VM table for people, a line a disk; what the VM has in common stands on the first."""
    kind = _kind(each["kind"], each["duplicate_of"])
    begin: tuple[object, ...] = (each["vm"], each["hypervisor"], kind, each["state"], int(each["resume_flag"]))
    for disk in each["disks"] or [{"device": "no disks", "address": ""}]:
        yield (*begin, disk["device"], disk["address"])
        begin = ("",) * len(begin)


def _kind(kind: str, duplicate_of: str | None) -> str:
    return f"{kind} (from {duplicate_of})" if duplicate_of else kind


def _disks(row: VmRow) -> str:
    return ", ".join(disk.device for disk in row.disks) or "no disks"
