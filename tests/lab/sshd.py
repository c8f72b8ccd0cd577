"""A real OpenSSH server on loopback, with accounts, keys and configuration of its own: nothing of this machine's or
this user's is used or changed. Needs root and ``install.sh``.

The server runs in a mount namespace in which ``/etc/passwd`` and ``/etc/shadow`` are files of the lab, so that it has
accounts with passwords that exist nowhere else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .machine import LabError
from .ports import free_port
from .qemus import cache_folder, unpacked

USER = "keeper"
USER_ID = 64999
PASSWORD = "a word for the lab"
_START_SECONDS = 30.0
_IN_A_NAMESPACE = """
set -e
if [ -n "$4" ]; then
    for name in usr etc; do
        mount -t overlay -o "lowerdir=$1/layer/$name:$4/$name:/$name" overlay "/$name"
    done
fi
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/shadow" /etc/shadow
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
cp "$1/authorized_keys" /run/authorized_keys
mount -t tmpfs -o mode=755 tmpfs /home
mkdir "/home/$3"
mount --bind "$1/home" "/home/$3"
exec "$2" -D -e -f "$1/sshd_config"
"""


@dataclass
class SshServer:
    """A server in a folder of its own, for a ``with``. ``root`` may log in with `key`, and so may `USER`, who also has
    `PASSWORD`.

    :param lines: of its configuration, which come first and therefore count
    :param sftp: what serves SFTP
    :param sudoers: who may do what by sudo there; empty: there is no sudo, unless this machine has one
    :param programs: further ones that lie in ``/usr/sbin`` there, where there is sudo
    """

    folder: Path
    lines: Sequence[str] = ()
    sftp: str = "internal-sftp"
    sudoers: str = ""
    programs: Sequence[Path] = ()
    port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def key(self) -> Path:
        """The private key that it lets in."""
        return self.folder / "key"

    @property
    def host_key(self) -> Path:
        """Its own private key."""
        return self.folder / "host_key"

    @property
    def known_hosts(self) -> Path:
        """A file that knows it."""
        return self.folder / "known_hosts"

    @property
    def config_file(self) -> Path:
        """A client's configuration in which it is called ``lab``."""
        return self.folder / "ssh_config"

    @property
    def home(self) -> Path:
        """What is ``/home/keeper`` to the server."""
        return self.folder / "home"

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(errors="replace")

    def __enter__(self) -> SshServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        make_key(self.key)
        make_key(self.host_key)
        self.home.mkdir(exist_ok=True)
        os.chown(self.home, USER_ID, USER_ID)
        self._write_accounts()
        self._write_configuration()
        self._write_layer()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and return when it listens."""
        root = cache_folder() / "sshd"
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"}
        script = ["sh", "-c", _IN_A_NAMESPACE, "sh", str(self.folder), str(root / "usr/sbin/sshd"), USER]
        script.append(str(unpacked("sudo", "sudo") / "root") if self.sudoers else "")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", *script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise LabError(f"sshd ended: {self.log}")
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise LabError(f"sshd does not listen: {self.log}")

    def stop(self) -> None:
        """End it and every connection that it has; idempotent."""
        if self._process is None:
            return
        for pid in _descendants(self._process.pid):
            _kill(pid)
        self._process.kill()
        self._process.wait()
        self._process = None

    def drop_connections(self) -> int:
        """End every connection, while the server goes on; returns how many processes there were."""
        assert self._process is not None
        children = _descendants(self._process.pid)
        for pid in children:
            _kill(pid)
        return len(children)

    def url(self, path: Path | str, user: str = "root") -> str:
        """The URL of a folder on it."""
        return f"sftp://{user}@127.0.0.1:{self.port}{path}"

    def _write_accounts(self) -> None:
        passwd = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith((USER, "sshd:"))]
        passwd += ["sshd:x:64998:65534::/run/sshd:/usr/sbin/nologin"]
        passwd += [f"{USER}:x:{USER_ID}:{USER_ID}::/home/{USER}:/bin/sh"]
        (self.folder / "passwd").write_text("\n".join(passwd) + "\n")
        hashed = subprocess.run(
            ["openssl", "passwd", "-6", "-stdin"], input=PASSWORD, capture_output=True, text=True, check=True
        ).stdout.strip()
        # An account whose field begins with "!" is locked, and let in by no key either.
        (self.folder / "shadow").write_text(f"root:*:19000::::::\n{USER}:{hashed}:19000::::::\n")

    def _write_layer(self) -> None:
        """What lies above sudo's package there."""
        for name in ("etc", "usr/sbin"):
            (self.folder / "layer" / name).mkdir(parents=True, exist_ok=True)
        rules = self.folder / "layer/etc/sudoers"
        rules.write_text(self.sudoers)
        rules.chmod(0o440)
        for program in self.programs:
            shutil.copy(program, self.folder / "layer/usr/sbin")

    def _write_configuration(self) -> None:
        public = self.key.with_suffix(".pub").read_text()
        (self.folder / "authorized_keys").write_text(public)
        (self.folder / "sshd_config").write_text(
            "\n".join(
                [
                    *self.lines,
                    f"Port {self.port}",
                    "ListenAddress 127.0.0.1",
                    f"HostKey {self.host_key}",
                    "AuthorizedKeysFile /run/authorized_keys",
                    "StrictModes no",
                    "UsePAM no",
                    "PermitRootLogin prohibit-password",
                    "PasswordAuthentication yes",
                    "PidFile none",
                    f"Subsystem sftp {self.sftp}",
                    "",
                ]
            )
        )
        host_key = " ".join(self.host_key.with_suffix(".pub").read_text().split()[:2])
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {host_key}\n")
        self.config_file.write_text(
            f"""
Host lab
    HostName 127.0.0.1
    Port {self.port}
    User root
Host *
    IdentityFile {self.key}
    IdentitiesOnly yes
    UserKnownHostsFile {self.known_hosts}
    GlobalKnownHostsFile none
"""
        )


def make_key(file: Path, passphrase: str = "", kind: str = "ed25519") -> None:
    """Make a key pair; one that is there stays."""
    if not file.exists():
        command = [
            "ssh-keygen",
            "-q",
            "-t",
            kind,
            "-N",
            passphrase,
            "-C",
            f"lab-{secrets.token_hex(3)}",
            "-f",
            str(file),
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _descendants(pid: int) -> list[int]:
    """The processes below `pid`, the lowest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            found += [*_descendants(child), child]
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
