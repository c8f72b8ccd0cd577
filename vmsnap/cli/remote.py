"""``--agent URL``: commands that an agent carries out, on this host or another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmsnap.cli.session import Session

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


def run_job(session: Session, verb: str, body: Mapping[str, Any]) -> Any:
    """Let the agent carry a verb out, show its progress, and return what it reported.

    :raises VmsnapError: it failed, with the exit code that it had there
    """
    from vmsnap.agent.client import job_error
    from vmsnap.cli.progress import progress_bar
    from vmsnap.controller.progress import Progress
    from vmsnap.errors import VmsnapError

    client = client_of(session)
    job = client.post(f"/jobs/{verb}", {key: value for key, value in body.items() if value is not None})
    seen: Mapping[str, Any] = job
    with progress_bar() as progress:
        for seen in client.watch(job["job"]):
            if seen.get("progress"):
                progress(Progress(**seen["progress"]))
    if seen["ended"] is None:
        raise VmsnapError(f"the agent went away; job {job['job']} goes on there", cure=f"see: vmsnap jobs {job['job']}")
    if seen["state"] != "done":
        raise job_error(seen)
    return seen["result"]
