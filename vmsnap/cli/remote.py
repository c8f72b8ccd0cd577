"""``--agent URL``: commands that an agent carries out, on this host or another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from vmsnap.cli.session import Session
from vmsnap.errors import UsageError

if TYPE_CHECKING:
    from vmsnap.agent.client import AgentClient

F = TypeVar("F", bound=Callable[..., Any])


def agent_option(function: F) -> F:
    """``--agent URL``, kept in the session."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value:
            ctx.ensure_object(Session).agent = value

    return click.option(
        "--agent",
        metavar="URL",
        envvar="VMSNAP_AGENT",
        expose_value=False,
        callback=keep,
        help="Let an agent do it: unix:/path, or https://host:port and VMSNAP_AGENT_TOKEN(_FILE). [env: VMSNAP_AGENT]",
    )(function)


def client_of(session: Session) -> AgentClient:
    """The agent that ``--agent`` names.

    :raises UsageError: the URL is wrong, or a token is needed
    """
    from vmsnap.agent.client import AgentClient
    from vmsnap.secret import from_environment

    return AgentClient(session.agent or "", from_environment("VMSNAP_AGENT_TOKEN", "agent's token"))


def by_agent(verb: str, body: Callable[..., Mapping[str, Any]]) -> Callable[[F], F]:
    """Adds ``--agent URL`` to a command: the agent carries out its job `verb` then, asked for with what `body` makes of
    the command's arguments. To stand right above ``@pass_session``.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def here_or_there(*given: Any, **arguments: Any) -> Any:
            session = click.get_current_context().ensure_object(Session)
            if not session.agent:
                return function(*given, **arguments)
            return report_job(session, verb, body(**arguments))

        return agent_option(cast("F", here_or_there))

    return decorate


def report_job(session: Session, verb: str, body: Mapping[str, Any]) -> None:
    """Let the agent carry a verb out, show its progress, and report what the command reported there.

    :raises VmsnapError: it failed, with the exit code that it had there
    """
    from vmsnap.agent.client import job_error
    from vmsnap.cli.document import show_document

    limit = {"limit_rate_bytes": session.limit_rate_bytes, "repository": session.repository}
    seen = run_job(session, verb, {**limit, **body})
    result, done = seen["result"], seen["state"] == "done"
    if result is not None or (done and session.json):
        session.emit(result, lambda: show_document(result))
    if not done:
        raise job_error(seen)
    if result is None:
        session.note(f"job {seen['job']} is done; what it reported was too long to be kept")


def run_job(session: Session, verb: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Let the agent carry a verb out, show its progress, and return the job when it has ended. Blocks; interrupted, the
    job goes on there.

    :raises VmsnapError: the agent refuses, cannot be reached, or went away
    """
    from vmsnap.cli.progress import progress_bar
    from vmsnap.controller.progress import Progress
    from vmsnap.errors import VmsnapError

    client = client_of(session)
    job = client.post(f"/jobs/{verb}", {key: value for key, value in body.items() if value is not None})
    seen: Mapping[str, Any] = job
    try:
        with progress_bar() as progress:
            for seen in client.watch(job["job"]):
                if seen.get("progress"):
                    progress(Progress(**seen["progress"]))
    except KeyboardInterrupt:
        session.note(f"job {job['job']} goes on there; see: vmsnap jobs {job['job']}")
        raise
    if seen["ended"] is None:
        raise VmsnapError(f"the agent went away; job {job['job']} goes on there", cure=f"see: vmsnap jobs {job['job']}")
    return seen


def host_path(path: Path | None) -> str | None:
    """A path on the agent's host.

    :raises UsageError: it would mean another place there than here
    """
    if path is not None and not path.is_absolute():
        raise UsageError(f"{str(path)!r} is not a whole path", cure="it is on the agent's host: begin it with /")
    return None if path is None else str(path)
