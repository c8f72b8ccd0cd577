"""moto's S3 server: takes any credentials and any check sum, but has versions, object lock and a great many errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.ports import free_port
from tests.servers.processes import Processes
from tests.servers.s3 import S3Server


@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    """The server, answering, while the context lasts."""
    port = free_port()
    with Processes(folder) as processes:
        command = [sys.executable, "-m", "tests.servers.moto_process", str(port)]
        processes.start(
            "moto", command, os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        )
        processes.wait_for(port)
        yield S3Server("moto", port, "any", "anything", processes)
