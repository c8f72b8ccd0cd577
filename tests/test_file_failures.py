"""Every call on a file of the state folder, the RAM images, the disks' snapshots and a local repository fails in turn,
with each of ENOSPC, EIO, EDQUOT, ENOMEM and EMFILE for a moment, and with ENOSPC for good: the guest runs on, the error
is one line, nothing is left and nothing is lost.
"""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Counted
from tests.storedfiles.recording import build_library
from tests.world import World

CASES = int(os.environ.get("VMSNAP_FILE_FAILURES", "100"))
SEED = int(os.environ.get("VMSNAP_FILE_SEED", "1"))
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ENOMEM, errno.EMFILE)
"""Those of between.c."""
NEVER = 1 << 40
FULL_CHECK_EACH = 20


class Process:
    """The process in which calls fail."""

    def __init__(self, world: World, library: Path) -> None:
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            # RAM images lie there too.
            "RECORDED_FOLDER": "/dev/shm",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        argv = [sys.executable, "-m", "tests.storedfiles.failing", str(world.folders.state_dir), world.url]
        self._process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def back_up(self, number: int, choice: int, lasting: bool) -> dict[str, Any]:
        """Let the call of that number fail."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{number} {choice} {int(lasting)}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert self._process.stdout.readline() == "ended\n"
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def process(world: World, tmp_path: Path) -> Iterator[Process]:
    started = Process(world, build_library(tmp_path))
    yield started
    started.close()


@pytest.mark.timeout(900)
def test_whatever_call_on_a_file_fails(world: World, process: Process, counted: Counted) -> None:
    process.back_up(NEVER, 0, False)
    calls = NEVER - process.back_up(NEVER, 0, False)["left"]
    every = [(number, choice, False) for number in range(1, calls + 1) for choice in range(len(ERRORS))]
    every += [(number, ERRORS.index(errno.ENOSPC), True) for number in range(1, calls + 1)]
    cases = sorted(random.Random(SEED).sample(every, min(CASES, len(every))))
    failed = 0
    for index, case in enumerate(cases):
        answer = process.back_up(*case)
        try:
            assert "traceback" not in answer, answer["traceback"]
            failed += "error" in answer
            assert "\n" not in answer.get("error", "")
            see_that_nothing_is_lost(world, answer.get("backup"), whole=index % FULL_CHECK_EACH == 0)
        except BaseException as e:
            e.add_note(f"the case was {case} of {calls} calls; the answer {answer}")
            raise
    assert 0 < failed < len(cases), "some are survived, and some cannot be"
    counted(
        f"{len(cases)} of {len(every)} failures of {calls} calls; {failed} backups failed, the others were made",
        cases=len(cases),
    )


def see_that_nothing_is_lost(world: World, backup: str | None, *, whole: bool) -> None:
    """:param whole: everything is read, and another backup made; and the repository becomes small again"""
    assert world.status()["state"] == "executing"
    with world.controller() as controller:
        assert controller.recover().kept == ()
    assert world.files() == world.files_at_rest
    repository = world.repository()
    there = [manifest.backup for manifest in repository.list()]
    if backup:
        assert backup in there
    if not whole:
        return
    with world.controller() as controller:
        controller.backup("vm001", repository)
    world.see_that_all_is_well()
    assert not repository.check(read_data=True).damaged
    for one in there:
        repository.forget(one)
    repository.gc(dead_after_seconds=0)
    repository.gc(dead_after_seconds=0)
