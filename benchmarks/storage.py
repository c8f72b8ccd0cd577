"""How fast storage backends are beside other tools on the same servers, near and far; the table goes into
docs/storage.md.

    sh benchmarks/install.sh; python -m benchmarks.storage [--mib 256] [--rounds 3] [--docs]

The servers are those of the tests: OpenStack Swift with its S3 interface, Debian's sshd. The distance is made by a
proxy on this machine that hands everything on so much later. Every run is a process of its own, its start counted.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.document import host, markdown_table, replace_section
from tests.lab.sshd import SshServer
from tests.proxy import Proxy
from tests.servers.s3 import S3Server
from tests.servers.swift import swift

PAGE = Path(__file__).resolve().parent.parent / "docs" / "storage.md"
LATENCIES_MS = (0, 20, 100)
_FAR_MS = 100
"""From here on half is moved: some tools need minutes for it."""
_OBJECT_BYTES = 32 << 20
_CACHE = Path(os.environ.get("VMSNAP_BENCH_CACHE", "/var/cache/vmsnap-bench"))
_RESTIC = _CACHE / "restic/root/usr/bin/restic"
_AWS = _CACHE / "aws/bin/aws"
_RUN_SECONDS = 300.0


@dataclass(frozen=True)
class Site:
    """Where a contestant works in one run: the server's port as it is seen there, and folders."""

    port: int
    place: str
    source: Path
    target: Path
    environment: dict[str, str]
    ssh_config: Path


@dataclass(frozen=True)
class Contestant:
    """A tool: the commands that put and get; `prepare` is not measured."""

    name: str
    protocol: str
    put: Callable[[Site], Sequence[str]]
    get: Callable[[Site], Sequence[str]]
    prepare: Callable[[Site], Sequence[str]] | None = None


def _mover(tool: str, direction: str, url: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.storage_mover", tool, direction, url, str(folder)]


def _aws(*words: str) -> list[str]:
    return [str(_AWS), "s3", "cp", "--recursive", "--quiet", *words]


def _restic(url: str, *words: str) -> list[str]:
    return [str(_RESTIC), "-q", "--no-cache", "-r", url, *words]


def _sftp_url(site: Site) -> str:
    return f"sftp://root@127.0.0.1:{site.port}{site.place}"


def _restic_sftp(site: Site, *words: str) -> list[str]:
    command = f"sftp.command=ssh -F {site.ssh_config} -p {site.port} 127.0.0.1 -s sftp"
    return [*_restic(f"sftp:root@127.0.0.1:{site.place}", "-o", command), *words]


def _openssh(site: Site, batch: str) -> list[str]:
    script = site.target.parent / "batch"
    script.write_text(batch)
    return ["sftp", "-q", "-F", str(site.ssh_config), "-P", str(site.port), "-b", str(script), "127.0.0.1"]


CONTESTANTS = (
    Contestant(
        "vmsnap",
        "s3",
        lambda site: _mover("vmsnap", "put", f"s3://{site.place}", site.source),
        lambda site: _mover("vmsnap", "get", f"s3://{site.place}", site.target),
    ),
    Contestant(
        "boto3 upload_file, download_file",
        "s3",
        lambda site: _mover("boto3", "put", f"s3://{site.place}", site.source),
        lambda site: _mover("boto3", "get", f"s3://{site.place}", site.target),
    ),
    Contestant(
        "aws s3 cp",
        "s3",
        lambda site: _aws(str(site.source), f"s3://{site.place}"),
        lambda site: _aws(f"s3://{site.place}", str(site.target)),
    ),
    Contestant(
        "restic",
        "s3",
        lambda site: _restic(f"s3:http://127.0.0.1:{site.port}/{site.place}", "backup", str(site.source)),
        lambda site: _restic(
            f"s3:http://127.0.0.1:{site.port}/{site.place}", "restore", "latest", "--target", str(site.target)
        ),
        lambda site: _restic(f"s3:http://127.0.0.1:{site.port}/{site.place}", "init"),
    ),
    Contestant(
        "vmsnap",
        "sftp",
        lambda site: _mover("vmsnap", "put", _sftp_url(site), site.source),
        lambda site: _mover("vmsnap", "get", _sftp_url(site), site.target),
    ),
    Contestant(
        "OpenSSH sftp",
        "sftp",
        lambda site: _openssh(site, f"put -f {site.source}/* {site.place}/\n"),
        lambda site: _openssh(site, f"get {site.place}/* {site.target}/\n"),
    ),
    Contestant(
        "restic",
        "sftp",
        lambda site: _restic_sftp(site, "backup", str(site.source)),
        lambda site: _restic_sftp(site, "restore", "latest", "--target", str(site.target)),
        lambda site: _restic_sftp(site, "init"),
    ),
)


class Measurement:
    """All runs, on servers that are running."""

    def __init__(self, folder: Path, server: S3Server, sshd: SshServer, mib: int) -> None:
        self.folder = folder
        self.server = server
        self.sshd = sshd
        objects = max(2, (mib << 20) // _OBJECT_BYTES)
        self._near = self._new_source("near", objects)
        self._far = self._new_source("far", objects // 2)
        self.seconds: dict[tuple[str, str, int, str], list[float]] = {}

    def _new_source(self, name: str, objects: int) -> Path:
        folder = self.folder / name
        folder.mkdir()
        for number in range(objects):
            (folder / f"{number:04d}").write_bytes(secrets.token_bytes(_OBJECT_BYTES))
        return folder

    def _source(self, latency_ms: int) -> Path:
        return self._far if latency_ms >= _FAR_MS else self._near

    def round(self, first: int) -> None:
        """Every contestant once at every distance, beginning with another one each time."""
        turn = [*CONTESTANTS[first % len(CONTESTANTS) :], *CONTESTANTS[: first % len(CONTESTANTS)]]
        for latency_ms in LATENCIES_MS:
            for contestant in turn:
                self._run(contestant, latency_ms)

    def _run(self, contestant: Contestant, latency_ms: int) -> None:
        with self._site(contestant.protocol, latency_ms) as site:
            if contestant.prepare:
                _timed(contestant.prepare(site), site)
            for direction, command in (("put", contestant.put), ("get", contestant.get)):
                seconds = _timed(command(site), site)
                self.seconds.setdefault((contestant.protocol, contestant.name, latency_ms, direction), []).append(
                    seconds
                )
            got = sum(path.stat().st_size for path in site.target.rglob("*") if path.is_file())
            if got != self.moved_bytes(latency_ms):
                raise SystemExit(f"{contestant.name} over {contestant.protocol} got {got} bytes")
        took = ", ".join(f"{way} {self._last(contestant, latency_ms, way):.1f} s" for way in ("put", "get"))
        print(f"{latency_ms} ms {contestant.protocol} {contestant.name}: {took}", file=sys.stderr, flush=True)

    def _last(self, contestant: Contestant, latency_ms: int, direction: str) -> float:
        return self.seconds[contestant.protocol, contestant.name, latency_ms, direction][-1]

    def moved_bytes(self, latency_ms: int) -> int:
        """What there is to move at this distance."""
        return sum(path.stat().st_size for path in self._source(latency_ms).iterdir())

    @contextmanager
    def _site(self, protocol: str, latency_ms: int) -> Iterator[Site]:
        upstream = self.server.port if protocol == "s3" else self.sshd.port
        far = Proxy(("127.0.0.1", upstream), latency_seconds=latency_ms / 2000) if latency_ms else nullcontext()
        work = Path(tempfile.mkdtemp(dir=self.folder))
        with far as proxy:
            port = proxy.port if proxy else upstream
            target, remote = work / "target", work / "remote"
            target.mkdir()
            remote.mkdir()
            config = work / "ssh_config"
            config.write_text(self._ssh_config(port))
            place = f"{self.server.new_bucket()}/bench" if protocol == "s3" else str(remote)
            environment = {
                **os.environ,
                **self.server.environment(port),
                "RESTIC_PASSWORD": "benchmark",
                "HOME": str(work),
                "VMSNAP_SSH_CONFIG": str(config),
                "PYTHONPATH": str(PAGE.parent.parent),
            }
            yield Site(port, place, self._source(latency_ms), target, environment, config)
        shutil.rmtree(work)

    def _ssh_config(self, port: int) -> str:
        known = self.folder / f"known-{port}"
        key = self.sshd.host_key.with_suffix(".pub").read_text().split()
        known.write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
        return (
            f"Host 127.0.0.1\n  User root\n  IdentityFile {self.sshd.key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {known}\n  StrictHostKeyChecking yes\n"
        )

    def table(self) -> str:
        """MB/s of put and get at each distance; in bold where nobody was faster over that protocol."""
        best: dict[tuple[str, int, str], float] = {}
        for (protocol, _, latency_ms, direction), took in self.seconds.items():
            key = (protocol, latency_ms, direction)
            best[key] = min(best.get(key, 1e9), median(took))
        rows = []
        for contestant in CONTESTANTS:
            row = [f"{contestant.protocol}: {contestant.name}"]
            for direction in ("put", "get"):
                for latency_ms in LATENCIES_MS:
                    seconds = median(self.seconds[contestant.protocol, contestant.name, latency_ms, direction])
                    text = f"{self.moved_bytes(latency_ms) / seconds / 1e6:.0f}"
                    fastest = seconds <= best[contestant.protocol, latency_ms, direction]
                    row.append(f"**{text}**" if fastest else text)
            rows.append(row)
        head = ["MB/s", *(f"{way} at {ms} ms" for way in ("put", "get") for ms in LATENCIES_MS)]
        return markdown_table(head, rows)


def _timed(command: Sequence[str], site: Site) -> float:
    begun = time.perf_counter()
    done = subprocess.run(
        command, env=site.environment, cwd=PAGE.parent.parent, capture_output=True, text=True, timeout=_RUN_SECONDS
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return seconds


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--mib", type=int, default=256, help=f"how much is moved each time; half of it from {_FAR_MS} ms on"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--docs", action="store_true", help="write the table into docs/storage.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmsnap-storage-", dir=options.folder) as name:
        folder = Path(name)
        (folder / "swift").mkdir()
        with swift(folder / "swift") as server, SshServer(folder / "sshd") as sshd:
            measurement = Measurement(folder, server, sshd, options.mib)
            for number in range(options.rounds):
                measurement.round(number)
            text = measurement.table()
    words = f"--mib {options.mib} --rounds {options.rounds}"
    text = f"`python -m benchmarks.storage {words}` on {host()}; medians.\n\n{text}"
    print(text)
    if options.docs:
        replace_section("storage", text, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
