"""``vmsnap demo``: the whole story on a simulated VM, told as it happens, and every claim looked at."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmsnap.cli.session import Session, SessionCommand, pass_session
from vmsnap.errors import VmsnapError

if TYPE_CHECKING:
    from vmsnap.controller.interruption import Interruption


@click.command(cls=SessionCommand, epilog="vmsnap demo\nvmsnap demo --keep")
@click.option("--keep", is_flag=True, help="Keep the folder with the repository and the disks.")
@pass_session
def demo(session: Session, keep: bool) -> None:
    """Show the whole story on a simulated VM, in under a minute.

    A VM works; it is backed up live; a second one is brought up from the backup and goes on from there, while the
    first never stopped. Everything happens in a temporary folder and is removed afterwards, on Ctrl-C too. Exit
    code 0 only if everything was seen to be true.
    """
    from vmsnap.cli.demo_story import Story
    from vmsnap.controller.interruption import Interruption

    begun = time.monotonic()
    interruption = Interruption()
    with interruption.handled():
        folder = Path(tempfile.mkdtemp(prefix="vmsnap-demo-"))
        passphrase = secrets.token_urlsafe(12)
        with _tidied(folder, interruption, keep, passphrase):
            story = Story(folder, passphrase, silent=session.json)
            try:
                facts = story.tell()
            finally:
                with interruption.deferred(quietly=True):
                    story.close()
    seconds = time.monotonic() - begun
    untrue = [claim for claim, seen in story.claims.items() if not seen]
    claims = [{"claim": claim, "seen": seen} for claim, seen in story.claims.items()]
    document = {**facts, "claims": claims, "seconds": seconds, "folder": str(folder) if keep else None}
    session.emit(document, lambda: _end(story.claims, seconds, folder if keep else None))
    if untrue:
        raise VmsnapError(f"not seen to be true: {'; '.join(untrue)}")


@contextmanager
def _tidied(folder: Path, interruption: Interruption, keep: bool, passphrase: str) -> Iterator[None]:
    """Remove the folders of the demo in the end, those of its duplicates in memory too."""
    from vmsnap.host import HostFolders

    memory_dir = HostFolders.find(folder / "state").memory_dir
    try:
        yield
    finally:
        with interruption.deferred(quietly=True):
            shutil.rmtree(memory_dir, ignore_errors=True)
            if keep:
                kept = folder / "passphrase"
                kept.touch(mode=0o600)
                kept.write_text(passphrase + "\n")
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _end(claims: dict[str, bool], seconds: float, kept: Path | None) -> None:
    click.echo()
    for claim, seen in claims.items():
        mark = click.style("seen    ", fg="green") if seen else click.style("NOT SEEN", fg="red", bold=True)
        click.echo(f"  {mark}  {claim}")
    click.echo()
    if kept:
        click.echo(f"It took {seconds:.1f} s. The VMs are stopped; the rest is in {kept}:")
        click.echo(f"  VMSNAP_PASSPHRASE_FILE={kept}/passphrase vmsnap list -r {kept}/repository")
    else:
        click.echo(f"It took {seconds:.1f} s; the VMs, the repository and the folder are gone.")
