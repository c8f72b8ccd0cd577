"""The transcripts on the how-to pages are what their commands print, run one after the other against the real thing.

To write what is printed into a page anew: ``VMSNAP_WRITE_TRANSCRIPTS=1 pytest tests/test_transcripts.py``. That of LVM
is run in the storage guest, by ``in_guest/test_lvm_page.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import libvirt_stage
from tests.lab import zfs_fuse
from tests.lab.sshd import SshServer
from tests.lab.tgtd import TargetServer, programs
from tests.pages import see
from tests.servers.s3 import S3Server
from tests.test_file_mechanism import xfs

__all__ = ["xfs"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as made:
        yield Path(made)


@pytest.mark.parametrize("name", ["simulated.md", "local.md"])
def test_a_page_that_needs_nothing_but_python(name: str, folder: Path) -> None:
    see(name, folder)


@pytest.mark.qemu
def test_the_page_of_a_qemu(folder: Path) -> None:
    see("qemu.md", folder)


@pytest.mark.sshd
def test_the_page_of_sftp(folder: Path, tmp_path: Path) -> None:
    with SshServer(tmp_path / "sshd") as server:
        place = server.url(folder / "place")
        see("sftp.md", folder, {"PLACE": place, "VMSNAP_SSH_CONFIG": str(server.config_file)})


def test_the_page_of_s3(folder: Path, swift_server: S3Server) -> None:
    place = f"s3://{swift_server.new_bucket()}/vmsnap"
    see("storage.md", folder, {"PLACE": place, **swift_server.environment()})


@pytest.mark.libvirt
def test_the_page_of_libvirt(folder: Path) -> None:
    # QEMU's user has to get to the disks of the copy.
    folder.chmod(0o755)
    with libvirt_stage.staged() as stage:
        uri = stage.libvirtd.uri
        see("libvirt.md", folder, {"URI": uri, "VIRSH_DEFAULT_CONNECT_URI": uri})


@pytest.mark.lab
def test_the_page_of_zfs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(zfs_fuse.programs()), prepend=":")
    with zfs_fuse.ZfsFuse(tmp_path / "zfs", "tank", folder / "tank") as zfs:
        zfs.run("zfs", "create", "tank/vm")
        for name in ("web1.img", "web1-data.img"):
            (folder / "tank/vm" / name).write_bytes(bytes(1 << 20))
        see("zfs.md", folder)


@pytest.mark.lab
def test_the_page_of_iscsi(folder: Path, tmp_path: Path, xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs()), prepend=":")
    (folder / "luns").symlink_to(xfs)
    image, configuration = folder / "luns" / "web1.img", folder / "vmsnap.toml"
    image.write_bytes(bytes(1 << 20))
    with TargetServer(tmp_path / "tgtd") as server:
        server.add(target := "iqn.2009-12.com.example:web1", image)
        configuration.write_text(f"[mechanism.iscsi]\ncontrol_port = {server.control_port}\n")
        see("iscsi.md", folder, {"LUN": server.address(target), "VMSNAP_CONFIG": str(configuration)})
