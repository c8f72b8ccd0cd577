"""How a command ends: errors become one clear line on standard error, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from vmsnap.errors import Interrupted, VmsnapError

if TYPE_CHECKING:
    from vmsnap.cli.session import Session

UNEXPECTED = 1
USAGE = 2


class Stopped(Exception):
    """Carries an interruption past click, which would write an empty line of its own."""


def one_line(text: str) -> str:
    """`text` on one line, without control characters: names from outside must not drive the terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def exit_code_of(run: Callable[[], object], session: Session) -> int:
    """Call `run`, report what it raises, and return the exit code of the process."""
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except VmsnapError as e:
        return _report(session, e)
    except Stopped as e:
        return _report_stop(session, e.__cause__)
    except (click.Abort, KeyboardInterrupt) as e:
        return _report_stop(session, e)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        return _report_usage(session, e)
    except BrokenPipeError:
        # The reader has had enough. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except Exception as e:  # noqa: BLE001 - the last resort: no traceback unless it was asked for
        _traceback(session)
        text = one_line(f"{type(e).__name__}: {e}").rstrip(": ")
        again = "" if session.debug else "; run again with --debug"
        _say(session, f"unexpected {text}{again}")
        return UNEXPECTED


def _report_stop(session: Session, cause: BaseException | None) -> int:
    if sys.stderr.isatty():
        click.echo(err=True)  # behind the terminal's ^C
    if isinstance(cause, Interrupted):
        return _report(session, cause)
    _say(session, "interrupted")
    return Interrupted.exit_code


def _report(session: Session, error: VmsnapError | Interrupted) -> int:
    _traceback(session)
    _say(session, str(error))
    for note in getattr(error, "__notes__", ()):
        _say(session, note)
    return error.exit_code


def _report_usage(session: Session, error: click.ClickException) -> int:
    if getattr(click.exceptions, "NoArgsIsHelpError", None) and isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return USAGE
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    where = f" (see: {context.command_path} --help)" if context is not None else ""
    _say(session, f"{message[:1].lower()}{message[1:]}{where}")
    return USAGE


def _say(session: Session, text: str) -> None:
    click.echo(f"{session.program}: {one_line(text)}", err=True)


def _traceback(session: Session) -> None:
    if session.debug:
        import traceback

        click.echo(traceback.format_exc(), err=True, nl=False)
