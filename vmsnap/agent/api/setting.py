"""Routes of schedules and tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException, Path, Request
from starlette.responses import Response

from vmsnap.agent.api.context import caller_of, context_of, needs
from vmsnap.agent.api.shapes import (
    JobList,
    MadeToken,
    NewToken,
    Paused,
    ScheduleList,
    ScheduleShape,
    TokenList,
    TokenShape,
)
from vmsnap.agent.api.working import job_list
from vmsnap.agent.schedule import fields_of, next_slot, schedule_from
from vmsnap.agent.schedules import ScheduleRow
from vmsnap.agent.tokens import ADMIN, OPERATE, READ, token_document

router = APIRouter(prefix="/api/v1")
NamePath = Annotated[str, Path(max_length=200)]
Fields = Annotated[
    dict[str, Any], Body(description="see docs/agent.md", examples=[{"name": "nightly", "cron": "30 2 * * *"}])
]


def schedule_document(row: ScheduleRow) -> dict[str, Any]:
    """A schedule as JSON shows it."""
    slot = None if row.paused else next_slot(row.schedule, datetime.now(UTC))
    return {
        "name": row.schedule.name,
        "paused": row.paused,
        "configured": row.configured,
        "next": None if slot is None else f"{slot:%Y-%m-%dT%H:%M:%SZ}",
        "schedule": fields_of(row.schedule),
    }


@router.get("/schedules", response_model=ScheduleList, dependencies=[needs(READ)])
def list_schedules(request: Request) -> dict[str, Any]:
    """All schedules, by name."""
    return {"items": [schedule_document(row) for row in context_of(request).house().schedules.rows()]}


@router.post("/schedules", status_code=201, response_model=ScheduleShape, dependencies=[needs(ADMIN)])
def add_schedule(request: Request, fields: Fields) -> dict[str, Any]:
    """Add a schedule, with the fields of a schedule in the configuration file and its name."""
    from vmsnap.places import refuse_secrets

    context = context_of(request)
    schedule = schedule_from(fields)
    refuse_secrets(schedule.repository)
    context.house().schedules.add(schedule)
    context.wake()
    return schedule_document(context.house().schedules.get(schedule.name))


@router.get("/schedules/{name}", response_model=ScheduleShape, dependencies=[needs(READ)])
def show_schedule(request: Request, name: NamePath) -> dict[str, Any]:
    """One schedule."""
    return schedule_document(context_of(request).house().schedules.get(name))


@router.delete("/schedules/{name}", status_code=204, response_class=Response, dependencies=[needs(ADMIN)])
def remove_schedule(request: Request, name: NamePath) -> Response:
    """Remove a schedule; what of it is queued is taken back."""
    context_of(request).house().schedules.remove(name)
    context_of(request).wake()
    return Response(status_code=204)


@router.put("/schedules/{name}/paused", response_model=ScheduleShape, dependencies=[needs(OPERATE)])
def pause_schedule(request: Request, name: NamePath, wanted: Paused) -> dict[str, Any]:
    """Let a schedule rest, or go on; what fell into the rest is not caught up."""
    row = context_of(request).house().schedules.pause(name, wanted.paused)
    context_of(request).wake()
    return schedule_document(row)


@router.post("/schedules/{name}/run", status_code=202, response_model=JobList, dependencies=[needs(OPERATE)])
def run_schedule(request: Request, name: NamePath) -> JobList:
    """Run a schedule now."""
    jobs = context_of(request).house().run_now(name, caller_of(request).name)
    context_of(request).wake()
    return job_list(jobs)


@router.get("/tokens", response_model=TokenList, dependencies=[needs(ADMIN)])
def list_tokens(request: Request) -> TokenList:
    """All tokens, without what they are."""
    rows = context_of(request).house().tokens.rows()
    return TokenList(items=[TokenShape(**token_document(token)) for token in rows])


@router.post("/tokens", status_code=201, response_model=MadeToken, dependencies=[needs(ADMIN)])
def add_token(request: Request, wanted: NewToken) -> MadeToken:
    """Make a token. It is shown this once."""
    token = context_of(request).house().tokens.add(wanted.name, wanted.role, wanted.expires_seconds)
    return MadeToken(name=wanted.name, role=wanted.role, token=token)


@router.delete("/tokens/{name}", status_code=204, response_class=Response, dependencies=[needs(ADMIN)])
def remove_token(request: Request, name: NamePath) -> Response:
    """Remove a token."""
    if name == caller_of(request).name:
        raise HTTPException(409, "that is the token with which you ask")
    context_of(request).house().tokens.remove(name)
    return Response(status_code=204)
