"""``vmsnap list`` and ``vmsnap show``: the backups of a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from vmsnap.cli import output
from vmsnap.cli.remote import agent_option
from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.errors import DamageFound

if TYPE_CHECKING:
    from vmsnap.repository import Manifest, Repository


@click.command("list", cls=SessionCommand, epilog="vmsnap list -r /srv/backups\nvmsnap list --vm web1 --json")
@click.option("--vm", metavar="NAME", help="Only the backups of this VM.")
@agent_option
@pass_session
def list_backups(session: Session, vm: str | None) -> None:
    """List the backups, oldest first."""
    if session.agent:
        _list_of_agent(session, vm)
        return
    report_backups(session, session.open_repository(), vm)


@click.command(cls=SessionCommand, epilog="vmsnap show web1-20260101T120000Z-1a2b3c -r /srv/backups")
@click.argument("backup")
@agent_option
@pass_session
def show(session: Session, backup: str) -> None:
    """Show BACKUP (its id, or the beginning of it): what is in it, and the evidence that it is of one instant."""
    if session.agent:
        from vmsnap.cli.document import show_document
        from vmsnap.cli.remote import client_of

        found = client_of(session).get(f"/backups/{quote(backup, safe='')}")
        session.emit(found, lambda: show_document(found))
        return
    manifest = session.open_repository().manifest(backup)
    session.emit(full_document(manifest), lambda: _show(manifest))


def _list_of_agent(session: Session, vm: str | None) -> None:
    """What the catalogue of an agent has."""
    from vmsnap.cli.remote import client_of

    found = list(client_of(session).pages("/backups", "before", vm=vm))[::-1]
    headings = ("backup", "vm", "mode", "time", "pause", "stored", "repository")

    def people() -> None:
        rows = [
            (
                each["backup"],
                each["vm"],
                each["mode"],
                output.local_time(each["time"]),
                output.milliseconds(each["pause_seconds"]),
                output.size(each["stored_bytes"]),
                each["repository"],
            )
            for each in found
        ]
        output.table(headings, rows, right=("pause", "stored"))

    session.emit(found, people)


def report_backups(session: Session, repository: Repository, vm: str | None = None) -> None:
    """List the backups of a repository, of one VM or all.

    :raises DamageFound: a manifest is damaged; the others were listed
    """
    damaged: list[DamageFound] = []
    found = [manifest for manifest in repository.list(damaged.append) if vm in (None, manifest.vm)]

    lost_column = ["lost"] if any(manifest.lost for manifest in found) else []

    def people() -> None:
        output.table(
            ("backup", "vm", "mode", "time", "pause", "memory", "disks", "stored", "tags", *lost_column),
            [
                (
                    manifest.backup,
                    manifest.vm,
                    manifest.mode,
                    output.local_time(manifest.time),
                    output.milliseconds(manifest.pause_seconds),
                    output.size(manifest.memory_bytes),
                    output.size(sum(disk.size_bytes for disk in manifest.disks)),
                    output.size(manifest.stats.stored_bytes),
                    ", ".join(manifest.tags),
                    *(output.size(manifest.lost_bytes) for _ in lost_column),
                )
                for manifest in found
            ],
            right=("pause", "memory", "disks", "stored", "lost"),
        )

    session.emit([backup_document(manifest) for manifest in found], people)
    for damage in damaged[1:]:
        session.note(str(damage))
    if damaged:
        raise damaged[0]


def backup_document(manifest: Manifest) -> dict[str, Any]:
    """One backup as the JSON of ``list`` shows it."""
    return {
        "backup": manifest.backup,
        "vm": manifest.vm,
        "hypervisor": manifest.hypervisor,
        "mode": manifest.mode,
        "capture": manifest.capture,
        "time": manifest.time,
        "pause_seconds": manifest.pause_seconds,
        "memory_bytes": manifest.memory_bytes,
        "disks": [{"device": disk.device, "size_bytes": disk.size_bytes} for disk in manifest.disks],
        "read_bytes": manifest.stats.read_bytes,
        "stored_bytes": manifest.stats.stored_bytes,
        "seconds": manifest.stats.seconds,
        "lost_bytes": manifest.lost_bytes,
        "tags": list(manifest.tags),
        "remarks": list(manifest.remarks),
    }


def full_document(manifest: Manifest) -> dict[str, Any]:
    """One backup as the JSON of ``show`` shows it, the evidence included."""
    return {
        **backup_document(manifest),
        "freeze": manifest.freeze or None,
        "disks": [
            {
                "device": disk.device,
                "size_bytes": disk.size_bytes,
                "format": disk.format,
                "address": disk.address,
                "mechanism": disk.mechanism,
            }
            for disk in manifest.disks
        ],
        "read_only_disks": [
            {"device": disk.device, "size_bytes": disk.size_bytes, "format": disk.format, "address": disk.address}
            for disk in manifest.read_only_disks
        ],
        "memory": [
            {"region": region.region, "size_bytes": region.image.size_bytes, "page_bytes": region.page_bytes}
            for region in manifest.memory
        ],
        "lost": [{"part": lost.part, "offset": lost.offset, "length": lost.length} for lost in manifest.lost],
        "resume_flag": manifest.resume_flag,
        "moments": [
            {
                "name": moment.name,
                "time": output.utc_time(moment.wall_ns),
                "wall_ns": moment.wall_ns,
                "monotonic_ns": moment.monotonic_ns,
                "source": moment.source,
            }
            for moment in manifest.moments
        ],
        "hypervisor_version": manifest.hypervisor_version,
        "vmsnap": manifest.vmsnap,
    }


def _show(manifest: Manifest) -> None:
    output.fields(
        [
            ("backup", manifest.backup),
            ("vm", manifest.vm),
            ("time", output.local_time(manifest.time)),
            ("mode", manifest.mode),
            ("hypervisor", f"{manifest.hypervisor} {manifest.hypervisor_version}".strip()),
            ("capture", manifest.capture),
            *([("disks frozen", f"by {manifest.freeze}")] if manifest.freeze else []),
            ("pause", output.milliseconds(manifest.pause_seconds)),
            ("was executing", "yes" if manifest.resume_flag else "no"),
            ("memory", output.size(manifest.memory_bytes) if manifest.memory else "none, disks alone"),
            ("read", output.size(manifest.stats.read_bytes)),
            ("stored", output.size(manifest.stats.stored_bytes)),
            ("took", f"{manifest.stats.seconds:.1f} s"),
            *[("lost", f"{output.size(lost.length)} of {lost.part} at {lost.offset}") for lost in manifest.lost],
            ("tags", ", ".join(manifest.tags)),
            *[("remark", remark) for remark in manifest.remarks],
        ]
    )
    click.echo()
    output.table(
        ("disk", "size", "format", "mechanism", "address"),
        [(d.device, output.size(d.size_bytes), d.format, d.mechanism, d.address) for d in manifest.disks]
        + [(d.device, output.size(d.size_bytes), d.format, "read-only", d.address) for d in manifest.read_only_disks],
        right=("size",),
    )
    if manifest.moments:
        first = manifest.moments[0].monotonic_ns
        click.echo()
        output.table(
            ("moment", "after", "seen by"),
            [(m.name, f"{(m.monotonic_ns - first) / 1e6:.3f} ms", m.source) for m in manifest.moments],
            right=("after",),
        )
