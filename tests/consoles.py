"""The console scripts of snapshot mechanisms, in this process; and the same as somebody who has no rights."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

NOBODY = 65534


class Said(NamedTuple):
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


class Console:
    """One script, with a state folder and options of its own."""

    def __init__(self, script: click.Command, state: Path, options: Mapping[str, str] | None = None) -> None:
        self._script, self._state = script, state
        self._options = [word for key, value in (options or {}).items() for word in ("-o", f"{key}={value}")]

    def __call__(self, *words: str, status: int = 0) -> Any:
        """What the command reports, or, where it is to fail with that status, its error."""
        said = self.say(*words)
        assert said.status == status, said.err
        if status == 0:
            return json.loads(said.out)
        assert not said.out, "no document where nothing was done"
        return said.err

    def say(self, *words: str) -> Said:
        """Give the command, with ``--json``."""
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            self._script.main([words[0], "--json", "--state-dir", str(self._state), *words[1:], *self._options])
        return Said(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def as_nobody(work: Callable[[], Any]) -> Any:
    """What `work` returns, as JSON can tell it, in a process of the user ``nobody``. Needs root.

    What it imports must have been imported before: the interpreter may lie where nobody else may look.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer: dict[str, Any]
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.environ["HOME"] = "/nonexistent"
            answer = {"returned": work()}
        except BaseException:  # noqa: BLE001 - whatever it is, it is the test's
            answer = {"raised": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    assert "returned" in answer, answer["raised"]
    return answer["returned"]
