"""Value types as JSON."""

from __future__ import annotations

import os
import subprocess
import sys

_MEET = """
import sys, threading
from dataclasses import make_dataclass
from vmsnap.model import from_json
sys.setswitchinterval(1e-6)
for number in range(300):
    inner = make_dataclass(f"Inner{number}", [("a", int), ("b", tuple[str, ...])], frozen=True)
    outer = make_dataclass(f"Outer{number}", [("x", inner), ("y", list[inner])], frozen=True)
    barrier = threading.Barrier(4)
    found = []
    def meet():
        barrier.wait()
        found.append(from_json('{"x": {"a": 1, "b": []}, "y": []}', outer))
    threads = [threading.Thread(target=meet) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [outer(inner(1, ()), [])] * 4, found
"""


def test_several_threads_may_read_a_type_for_the_first_time_at_once() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _MEET], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
