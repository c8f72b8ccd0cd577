"""OpenStack Swift with its S3 interface, from PyPI: four processes, one device, one replica.

It enforces signatures and check sums, and has multipart uploads, ranges and conditional puts; versions and object lock
it has not. Sources of the settings: etc/*-server.conf-sample of swift 2.38, and the man pages of the same names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.ports import free_ports
from tests.servers.processes import Processes
from tests.servers.s3 import S3Server

_RINGS = """
import sys
from swift.common.ring import RingBuilder

folder, *ports = sys.argv[1:]
for kind, port in zip(("account", "container", "object"), map(int, ports)):
    builder = RingBuilder(2, 1, 1)
    place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "d1", "meta": "", **place})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""

_STORE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
log_level = ERROR

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

# A proxy that is not connected to a store within half a second answers 503: too soon where tests take all processors.
_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
log_level = ERROR

[pipeline:main]
pipeline = catch_errors s3api tempauth slo proxy-server

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
allow_multipart_uploads = true
storage_domain = {domain}

[filter:tempauth]
use = egg:swift#tempauth
user_test_vmsnap = {secret} .admin
user_test_stranger = {secret}

[filter:slo]
use = egg:swift#slo

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
conn_timeout = 30
node_timeout = 60
"""

DOMAIN = "s3.test"
"""The buckets are hosts of it too, for whoever can resolve their names."""
ACCESS_KEY, STRANGER_KEY, SECRET_KEY = "test:vmsnap", "test:stranger", "correct-horse-battery"


@contextmanager
def swift(folder: Path) -> Iterator[S3Server]:
    """The server, answering, while the context lasts. `folder` is empty, and on a file system with extended attributes
    (ext4, XFS).
    """
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    ports = dict(zip(("account", "container", "object", "proxy"), free_ports(4), strict=True))
    (folder / "devices" / "d1").mkdir(parents=True)
    # No other server can read what is in this one, which is all that the two words are for.
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n")
    rings = [str(ports[kind]) for kind in ("account", "container", "object")]
    subprocess.run([sys.executable, "-c", _RINGS, str(folder), *rings], check=True, capture_output=True)
    with Processes(folder) as processes:
        for kind, port in ports.items():
            text = (_PROXY if kind == "proxy" else _STORE).format(
                port=port, user=user, folder=folder, kind=kind, secret=SECRET_KEY, domain=DOMAIN
            )
            configuration = folder / f"{kind}-server.conf"
            configuration.write_text(text)
            program = Path(sys.executable).parent / f"swift-{kind}-server"
            processes.start(kind, [str(program), str(configuration)], os.environ)
        for port in ports.values():
            processes.wait_for(port)
        yield S3Server("swift", ports["proxy"], ACCESS_KEY, SECRET_KEY, processes)
