"""The commands of the console scripts of storage backends: each takes the URL of a place."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmsnap.cli import output
from vmsnap.cli.options import size_option
from vmsnap.cli.session import Session, SessionCommand, keep_storage_options, pass_session, write_options
from vmsnap.errors import StorageFull, UsageError

if TYPE_CHECKING:
    from vmsnap.roles import StorageBackend

_OBJECT_BYTES = 16 << 20
_SCHEMES = {"vmsnap-local": "file", "vmsnap-s3": "s3", "vmsnap-sftp": "sftp"}

F = TypeVar("F", bound=Callable[..., Any])


class PlaceCommand(SessionCommand):
    """A command that takes ``-o``: the options of the script's storage backend are shown."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the examples, which are written for ``vmsnap-local``."""
        from vmsnap import registry

        session = ctx.find_object(Session)
        scheme = _SCHEMES.get(session.program) if session else None
        if scheme and scheme != "file":
            write_options(formatter, scheme, registry.storage_backend)
        shown, self.epilog = self.epilog, _example(self.epilog or "", scheme or "file")
        super().format_epilog(ctx, formatter)
        self.epilog = shown


def _url(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    session = ctx.ensure_object(Session)
    if value is not None:
        session.repository = value
    if ctx.resilient_parsing:
        return
    from vmsnap.places import scheme_of

    scheme, wanted = scheme_of(session.repository_url()), _SCHEMES.get(session.program)
    if wanted and scheme != wanted:
        raise UsageError(f"{session.program} serves {wanted}:// only, not {scheme}://", cure="use: vmsnap")


def _place(function: F) -> F:
    """The argument URL, and ``-o`` for the options of its backend."""
    options = click.option(
        "-o",
        metavar="KEY=VALUE",
        multiple=True,
        expose_value=False,
        callback=keep_storage_options,
        help="An option of the storage backend.",
    )
    return click.argument("url", required=False, expose_value=False, callback=_url)(options(function))


@click.command(cls=PlaceCommand, epilog="vmsnap-local init /srv/backups")
@_place
@click.option("--encryption", type=click.Choice(["none", "aes256-gcm"]), help="Default: as for vmsnap init.")
@pass_session
def init(session: Session, encryption: str | None) -> None:
    """Make a repository at URL."""
    from vmsnap.cli.init import make_repository

    make_repository(session, session.repository_url(), encryption)


@click.command("list", cls=PlaceCommand, epilog="vmsnap-local list /srv/backups")
@_place
@pass_session
def list_backups(session: Session) -> None:
    """List the backups of the repository at URL."""
    from vmsnap.cli.listing import report_backups

    report_backups(session, session.open_repository())


@click.command(cls=PlaceCommand, epilog="vmsnap-local check /srv/backups --read-data")
@_place
@click.option("--read-data", is_flag=True, help="Read and authenticate every stored byte too.")
@pass_session
def check(session: Session, read_data: bool) -> None:
    """Check the repository at URL."""
    from vmsnap.cli.integrity import report_check

    report_check(session, session.open_repository(), read_data)


@click.command(cls=PlaceCommand, epilog="vmsnap-local doctor /srv/backups")
@_place
@pass_session
def doctor(session: Session) -> None:
    """Say whether the place at URL can be used, and what is missing. Changes nothing."""
    from vmsnap.cli.doctor import report_findings, storage_findings

    report_findings(session, storage_findings(session))


@click.command(cls=PlaceCommand, epilog="vmsnap-local bench /srv/backups --size 512M")
@_place
@size_option("--size", "size_bytes", default="128M", help="How much to put and get.")
@pass_session
def bench(session: Session, size_bytes: int) -> None:
    """Measure how fast objects are put to URL and got from it, one after the other.

    Puts are durable, as they are in a backup. Gets may be served from memory. Everything is removed afterwards.
    """
    from vmsnap.controller.interruption import Interruption

    if size_bytes <= 0:
        raise UsageError("there is nothing to measure in 0 bytes", cure="give --size 128M")
    url, storage = session.repository_url(), session.storage()
    try:
        with Interruption().handled():
            result = measure(storage, size_bytes)
    finally:
        storage.close()
    people = [
        ("put", f"{output.size(result.put_bytes_per_second)}/s, durable"),
        ("get", f"{output.size(result.get_bytes_per_second)}/s"),
        ("amount", f"{output.size(result.bytes)} in {result.objects} objects"),
    ]
    document = {
        "repository": url,
        "bytes": result.bytes,
        "objects": result.objects,
        "put_bytes_per_second": result.put_bytes_per_second,
        "get_bytes_per_second": result.get_bytes_per_second,
    }
    session.emit(document, lambda: output.fields(people))


@dataclass(frozen=True)
class Throughput:
    """What `measure` found."""

    bytes: int
    objects: int
    put_bytes_per_second: float
    get_bytes_per_second: float


def measure(storage: StorageBackend, size_bytes: int) -> Throughput:
    """Put objects of `size_bytes` together, get them, and delete them whatever happens.

    :raises StorageFull: they would take more than half of what is free
    :raises StorageError: the storage failed
    """
    free = storage.properties().free_bytes
    if free is not None and size_bytes > free // 2:
        raise StorageFull(f"{storage.url} has {output.size(free)} free", cure="choose a smaller --size")
    sizes = [min(_OBJECT_BYTES, size_bytes - start) for start in range(0, size_bytes, _OBJECT_BYTES)]
    content = memoryview(secrets.token_bytes(sizes[0]))
    tag = secrets.token_hex(6)
    keys = [f"bench-{tag}-{number}" for number in range(len(sizes))]
    put = get = 0.0
    try:
        for key, length in zip(keys, sizes, strict=True):
            begun = time.perf_counter()
            storage.put(key, content[:length], if_absent=True)
            put += time.perf_counter() - begun
        for key in keys:
            begun = time.perf_counter()
            storage.get(key)
            get += time.perf_counter() - begun
    finally:
        for key in keys:
            storage.delete(key)
    return Throughput(size_bytes, len(keys), size_bytes / put, size_bytes / get)


def _example(text: str, scheme: str) -> str:
    """An example for ``vmsnap-local``, as the script of that scheme has it."""
    if scheme == "file":
        return text
    place = {"s3": "s3://bucket/prefix", "sftp": "sftp://user@host/path"}[scheme]
    return text.replace("vmsnap-local", f"vmsnap-{scheme}").replace("/srv/backups", place)
