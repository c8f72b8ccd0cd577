"""The commands of the console scripts of snapshot mechanisms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmsnap.cli import output
from vmsnap.cli.options import driver_options
from vmsnap.cli.session import Session, SessionCommand, pass_session, write_options
from vmsnap.errors import DriverUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsnap.controller.drivers import Drivers
    from vmsnap.controller.kept_snapshots import KeptSnapshot, KeptSnapshots
    from vmsnap.model import OwnedResource

_MECHANISMS = {"vmsnap-lvm": "lvm", "vmsnap-zfs": "zfs", "vmsnap-iscsi": "iscsi"}


class MechanismCommand(SessionCommand):
    """A command that takes ``-o``: the options of the script's mechanism are shown."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the examples."""
        from vmsnap import registry

        session = ctx.find_object(Session)
        if session is not None:
            write_options(formatter, _mechanism(session), registry.snapshot_mechanism)
        super().format_epilog(ctx, formatter)


def _mechanism(session: Session) -> str:
    return _MECHANISMS.get(session.program, "lvm")


def _drivers(session: Session, options: dict[str, str]) -> Drivers:
    from vmsnap.controller import Drivers

    configured = session.configuration.mechanism_options
    mechanism = _mechanism(session)
    return Drivers(session.folders().context(), {**configured, mechanism: {**configured.get(mechanism, {}), **options}})


def _kept(session: Session, options: dict[str, str]) -> KeptSnapshots:
    from vmsnap.controller.kept_snapshots import KeptSnapshots

    return KeptSnapshots(_drivers(session, options), session.folders().state_dir / KeptSnapshots.FOLDER)


@click.command(cls=MechanismCommand, epilog="vmsnap-lvm snapshot /dev/vg0/web1 /dev/vg0/web1-data")
@click.argument("addresses", metavar="ADDRESS...", nargs=-1, required=True)
@driver_options
@pass_session
def snapshot(session: Session, addresses: tuple[str, ...], options: dict[str, str]) -> None:
    """Take a snapshot of the disks at ADDRESS..., and keep it until it is deleted.

    Whoever writes to them is not stopped: what the snapshot of a disk shows is what a power cut would leave. Several
    disks show one instant only where the mechanism takes them together, which is told. Nobody watches how full a
    snapshot gets, as a backup does: give it room enough.
    """
    from vmsnap.controller.interruption import Interruption

    with Interruption().handled():
        taken = _kept(session, options).take(_mechanism(session), addresses)
    _report(session, taken)


@click.command("list", cls=MechanismCommand, epilog="vmsnap-lvm list")
@driver_options
@pass_session
def list_snapshots(session: Session, options: dict[str, str]) -> None:
    """List the snapshots that were taken by hand, and whatever else of this mechanism carries our tag."""
    from contextlib import closing

    mechanism = _mechanism(session)
    kept = _kept(session, options).all(mechanism)
    with closing(_drivers(session, options).mechanism(mechanism)) as driver:
        try:
            driver.check_usable()
        except DriverUnavailable:
            if kept:
                _report_all(session, kept, ())  # their names are what deletes them
            raise
        owned = driver.list_owned()
    _report_all(session, kept, owned)


def _report_all(session: Session, kept: Sequence[KeptSnapshot], owned: Sequence[OwnedResource]) -> None:
    rows = [(each.plan.tag, disk.address, _clones(each)) for each in kept for disk in each.plan.disks]
    resources = [{"kind": each.kind, "name": each.name, "tag": each.tag} for each in owned]

    def people() -> None:
        if not rows and not resources:
            click.echo("there are none")
        if rows:
            output.table(("snapshot", "of", "clones"), rows)
            click.echo()
        if resources:
            output.table(("kind", "name"), [(each["kind"], each["name"]) for each in resources])

    session.emit({"snapshots": [_document(each) for each in kept], "resources": resources}, people)


@click.command(cls=MechanismCommand, epilog="vmsnap-lvm clone vmsnap-by-hand-0123456789 --as trial")
@click.argument("snapshot")
@click.option("--as", "name", metavar="NAME", required=True, help="What the clones are called.")
@driver_options
@pass_session
def clone(session: Session, snapshot: str, name: str, options: dict[str, str]) -> None:
    """Make writable disks of all disks of SNAPSHOT. They live on when it is deleted."""
    from vmsnap.controller.interruption import Interruption

    with Interruption().handled():
        disks = _kept(session, options).clone(_mechanism(session), snapshot, name)
    session.emit(
        {
            "snapshot": snapshot,
            "clone": name,
            "disks": [{"device": disk.device, "address": disk.address} for disk in disks],
        },
        lambda: output.fields([("clone", disk.address) for disk in disks]),
    )


@click.command(
    cls=MechanismCommand,
    epilog="vmsnap-lvm delete vmsnap-by-hand-0123456789 --clone trial\nvmsnap-lvm delete vmsnap-by-hand-0123456789",
)
@click.argument("snapshot")
@click.option("--clone", "name", metavar="NAME", default="", help="Delete its clones of that name instead.")
@driver_options
@pass_session
def delete(session: Session, snapshot: str, name: str, options: dict[str, str]) -> None:
    """Delete SNAPSHOT, or clones of it. What backups have made is not touched: vmsnap recover, vmsnap strays."""
    _kept(session, options).delete(_mechanism(session), snapshot, name)
    session.emit({"snapshot": snapshot, "clone": name, "deleted": True}, lambda: click.echo("deleted"))


@click.command(cls=MechanismCommand, epilog="vmsnap-lvm doctor")
@driver_options
@pass_session
def doctor(session: Session, options: dict[str, str]) -> None:
    """Say whether the mechanism works on this host, and what is missing. Changes nothing."""
    from contextlib import closing

    from vmsnap.cli.doctor import report_findings

    mechanism = _mechanism(session)
    with closing(_drivers(session, options).mechanism(mechanism)) as driver:
        report_findings(session, [(mechanism, finding) for finding in driver.doctor()])


def _clones(kept: KeptSnapshot) -> str:
    return ", ".join(sorted({clone.plan.name for clone in kept.clones}))


def _document(kept: KeptSnapshot) -> dict[str, Any]:
    return {
        "snapshot": kept.plan.tag,
        "complete": bool(kept.taken),
        "one_instant": kept.one_instant,
        "disks": [
            {"device": disk.device, "address": disk.address, "size_bytes": disk.size_bytes} for disk in kept.plan.disks
        ],
        "clones": [
            {
                "name": clone.plan.name,
                "device": clone.plan.device,
                "address": clone.disk.address if clone.disk else None,
            }
            for clone in kept.clones
        ],
    }


def _report(session: Session, kept: KeptSnapshot) -> None:
    if not kept.one_instant:
        session.note("the disks were taken one after the other: together they show no single instant")
    people = [("snapshot", kept.plan.tag), *((disk.device, disk.address) for disk in kept.plan.disks)]
    session.emit(_document(kept), lambda: output.fields(people))
