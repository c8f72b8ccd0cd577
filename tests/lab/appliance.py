"""A storage appliance: the storage guest with thin volumes behind tgt and behind LIO, an SSH server, and ports on the
host's loopback.

Nothing of the host is used but by its network: its commands are given over SSH, its LUNs are reached by iSCSI.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

from . import lio
from .machine import LabError
from .ports import free_ports
from .qemus import cache_folder, unpacked
from .sshd import make_key
from .started import Started
from .storage import ADDRESS, HOST_ADDRESS, StorageGuest
from .tgtd import programs

_BOOT_SECONDS = 240.0
_LVM = "lvm {} --config 'activation{{monitoring=0 udev_sync=0 udev_rules=0}}'"
_SCRIPT = """set -e
export PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
for module in virtio_net loop dm-snapshot dm-thin-pool; do modprobe $module; done
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
mkdir -p /run/sshd /run/tgtd /usr/local/sbin
ln -sf {programs}/tgtadm /usr/local/sbin/tgtadm
# Whoever runs the tests may have a shell that begins with much.
sed -i 's#^\\(root:.*:\\)[^:]*$#\\1/bin/sh#' /etc/passwd
echo 'sshd:x:64998:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd
echo '{user}:x:64999:64999::/:/bin/sh' >>/etc/passwd
printf 'root:*:19000::::::\\n{user}:*:19000::::::\\n' >/etc/shadow
cp /run/results/host_key /run/sshd_host_key
chmod 600 /run/sshd_host_key
truncate -s {group_mib}M /tmp/group.pv
device=$(losetup --find --show /tmp/group.pv)
{pvcreate} --quiet $device
{vgcreate} --quiet --physicalextentsize 1m vg0 $device
{lvcreate} --yes --type thin-pool --size {pool_mib}m --name pool vg0
{lio} start
{programs}/tgtd --iscsi portal={address}:3260
while ! tgtadm --lld iscsi --mode target --op show >/dev/null 2>&1; do sleep 0.1; done
LD_LIBRARY_PATH={sshd}/usr/lib/x86_64-linux-gnu:{sshd}/lib/x86_64-linux-gnu \\
    {sshd}/usr/sbin/sshd -f /run/results/sshd_config
"""
_LIO_PORT = 3261
USER = "keeper"
"""Somebody on it who may log in, and is not root."""


class Appliance(Started):
    """One appliance in a folder of its own, for a ``with``. Its tgtd and its LIO listen on its network's
    address alone. What serves a target is named ``tgt`` or ``lio``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ssh_port, tgt_port, lio_port = free_ports(3)
        self.ports = {"tgt": tgt_port, "lio": lio_port}
        self.guest = StorageGuest(folder, {self.ssh_port: 22, tgt_port: 3260, lio_port: _LIO_PORT})
        self._scripts = 0

    @property
    def key(self) -> Path:
        """The private key that it lets in."""
        return self.folder / "key"

    @property
    def known_hosts(self) -> Path:
        """A file that knows it."""
        return self.folder / "known_hosts"

    @property
    def initiator(self) -> str:
        """The address from which its tgtd sees the host come."""
        return HOST_ADDRESS

    def url(self, user: str = "root") -> str:
        """Where its SSH is."""
        return f"ssh://{user}@127.0.0.1:{self.ssh_port}"

    def portal(self, server: str) -> str:
        """Where that kind of targets is reached."""
        return f"127.0.0.1:{self.ports[server]}"

    def address(self, target: str, server: str) -> str:
        """The address of a target's first disk."""
        return f"iscsi://{self.portal(server)}/{target}/1"

    def start(self) -> None:
        """Boot it and have it serve; half a minute.

        :raise LabError: when it does not come up.
        """
        self.guest.start()
        make_key(self.key)
        results = self.guest.results
        make_key(results / "host_key")
        (results / "authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
        (results / "sshd_config").write_text(
            "ListenAddress 0.0.0.0\nHostKey /run/sshd_host_key\nAuthorizedKeysFile /run/results/authorized_keys\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPidFile none\nUseDNS no\n"
        )
        host_key = " ".join((results / "host_key.pub").read_text().split()[:2])
        self.known_hosts.write_text(f"[127.0.0.1]:{self.ssh_port} {host_key}\n")
        commands = {name: _LVM.format(name) for name in ("pvcreate", "vgcreate", "lvcreate")}
        places = {"programs": programs(), "sshd": cache_folder() / "sshd"}
        self.run(
            _SCRIPT.format(lio=_lio(), address=ADDRESS, user=USER, group_mib=420, pool_mib=380, **commands, **places)
        )

    def run(self, script: str) -> str:
        """Run a script on its console, past SSH.

        :raise LabError: when it fails.
        """
        self._scripts += 1
        ended = self.guest.run(f"appliance{self._scripts}", script, _BOOT_SECONDS)
        if ended.status:
            raise LabError(f"the appliance could not do that: {ended.output[-2000:]}")
        return ended.output

    def lvm(self, command: str, *words: str) -> str:
        """Give it a command of LVM."""
        return self.run(f"{_LVM.format(command)} {shlex.join(words)}\n")

    def add(self, target: str, volume: str, size_mib: int) -> None:
        """Make a thin volume, and a target of its tgtd whose disk it is, for this host."""
        self._make(volume, size_mib)
        number = 1 + len(self.targets())
        tgtadm = "/usr/local/sbin/tgtadm --lld iscsi"
        self.run(
            f"set -e\n{tgtadm} --mode target --op new --tid {number} --targetname {target}\n"
            f"{tgtadm} --mode logicalunit --op new --tid {number} --lun 1 --backing-store /dev/vg0/{volume}\n"
            f"{tgtadm} --mode target --op bind --tid {number} --initiator-address {HOST_ADDRESS}\n"
        )

    def add_lio(self, target: str, volume: str, size_mib: int, initiators: list[str], user: str, password: str) -> None:
        """Make a thin volume, and a target of its LIO whose disk it is, for these initiators with that account.

        :param initiators: a list, since a name alone would be a sequence too, of its letters
        """
        self._make(volume, size_mib)
        words = shlex.join(["add", target, f"/dev/vg0/{volume}", *initiators])
        self.run(f"{_lio()} {words} <<'ACCOUNT'\n{user} {password}\nACCOUNT\n")

    def targets(self) -> set[str]:
        """The names of all targets of its tgtd."""
        shown = self.run("/usr/local/sbin/tgtadm --lld iscsi --mode target --op show\n")
        return {line.split()[2] for line in shown.splitlines() if line.startswith("Target ")}

    def traces(self) -> set[str]:
        """The names of its volumes and targets, and what its LIO has open, each once."""
        volumes = self.lvm("lvs", "--noheadings", "--options", "lv_name", "vg0").split()
        shown = json.loads(self.run(f"{_lio()} show\n"))
        return {*volumes, *self.targets(), *shown["targets"], *(path.rpartition("/")[2] for path in shown["stores"])}

    def _make(self, volume: str, size_mib: int) -> None:
        self.lvm("lvcreate", "--yes", "--virtualsize", f"{size_mib}m", "--thinpool", "pool", "--name", volume, "vg0")

    def kill(self) -> None:
        """See `Started.kill`."""
        self.guest.kill()


def add_known_hosts(appliance: Appliance, port: int) -> None:
    """Have it be known behind another port, too: that of a proxy."""
    host_key = appliance.known_hosts.read_text().split(" ", 1)[1]
    with appliance.known_hosts.open("a") as file:
        file.write(f"[127.0.0.1]:{port} {host_key}")


def qemu_io(address: str, *commands: str) -> str:
    """Use a LUN by QEMU's own initiator.

    :raise subprocess.CalledProcessError: when it cannot be used so.
    """
    words = [word for command in commands for word in ("-c", command)]
    return subprocess.run(
        ["qemu-io", "-f", "raw", *words, address], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def _lio() -> str:
    """The lab's program for LIO, as a shell in the guest is told to run it."""
    return shlex.join(["/usr/bin/python3", lio.__file__, str(lio_library()), f"{ADDRESS}:{_LIO_PORT}"])


def lio_library() -> Path:
    """The folder that has rtslib.

    :raise LookupError: when install.sh has not been run.
    """
    return unpacked("lio", "rtslib") / "root/usr/lib/python3/dist-packages"
