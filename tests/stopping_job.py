"""The process of an agent's job that stops itself (SIGSTOP) when it has taken the job up, before it does any of it:
where the file `stop_order` names is there, which it takes away.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from vmsnap.cli import jobprocess

_carry_out = jobprocess._run


def stop_order(state_dir: Path, verb: str) -> Path:
    """The file at which one job of that verb stops."""
    return state_dir / f"stop-{verb}"


def _stop_and_carry_out(repository: tuple[str, ...], arguments: tuple[str, ...], progress: Path) -> int:
    try:
        stop_order(progress.parent.parent, arguments[0]).unlink()
    except FileNotFoundError:
        return _carry_out(repository, arguments, progress)
    os.kill(os.getpid(), signal.SIGSTOP)
    return _carry_out(repository, arguments, progress)


if __name__ == "__main__":
    jobprocess._run = _stop_and_carry_out
    sys.exit(jobprocess.main())
