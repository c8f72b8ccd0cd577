"""Routes that only look: VMs, backups, the summary, health, metrics."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query, Request
from starlette.responses import JSONResponse, Response

from vmsnap import __version__
from vmsnap.agent.api.context import caller_of, context_of, needs
from vmsnap.agent.api.shapes import BackupPage, BackupShape, Health, Summary, TimelinePage, VmPage, VmShape
from vmsnap.agent.times import utc_time
from vmsnap.agent.tokens import READ
from vmsnap.agent.vmpage import one_vm, timeline_page, vm_page

LOOP_MAY_TAKE_SECONDS = 90.0
"""A loop that has not gone round for so long hangs: it sleeps 5 s at most, and waits 10 s for the database."""

router = APIRouter(prefix="/api/v1")
Limit = Annotated[int, Query(ge=1, le=500)]
Text = Annotated[str, Query(max_length=200)]
NamePath = Annotated[str, Path(max_length=200)]


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
def health(request: Request) -> Any:
    """Whether the agent works: 200, or 503 where its loop hangs. Needs no token, and tells nothing else."""
    age = context_of(request).loop_age()
    well = age < LOOP_MAY_TAKE_SECONDS
    found = {"status": "ok" if well else "the loop hangs", "version": __version__, "loop_seconds": round(age, 3)}
    return found if well else JSONResponse(found, 503)


@router.get("/summary", response_model=Summary, dependencies=[needs(READ)])
def summary(request: Request) -> dict[str, Any]:
    """The host at a glance, and who asks."""
    house, caller = context_of(request).house(), caller_of(request)
    day_ago = time.time_ns() - 86400 * 10**9
    counts = house.database.rows(
        "SELECT (SELECT count(*) FROM vm WHERE kind = 'working') AS vms, (SELECT count(*) FROM catalogue) AS backups,"
        " (SELECT count(*) FROM job WHERE state IN ('failed', 'broken off') AND ended_ns > ?) AS failed,"
        " (SELECT count(*) FROM notice) AS notices",
        day_ago,
    )[0]
    return {
        "version": __version__,
        "role": caller.role,
        "who": caller.name,
        "vms": counts["vms"],
        "backups": counts["backups"],
        "open_jobs": len(house.jobs.open()),
        "failed_jobs_today": counts["failed"],
        "notices_waiting": counts["notices"],
        "repositories": house.repositories(),
    }


@router.get("/vms", response_model=VmPage, dependencies=[needs(READ)])
def list_vms(request: Request, after: Text = "", match: Text = "", limit: Limit = 100) -> dict[str, Any]:
    """The VMs of the VM table as they were when last seen, by name, a page at a time."""
    found = vm_page(context_of(request).house(), after=after, limit=limit + 1, match=match)
    return {"items": found[:limit], "next": found[limit - 1]["vm"] if len(found) > limit else None}


@router.get("/timeline", response_model=TimelinePage, dependencies=[needs(READ)])
def timeline(
    request: Request,
    days: Annotated[int, Query(ge=1, le=400)] = 7,
    after: Text = "",
    match: Text = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> dict[str, Any]:
    """The backups of all VMs in the last days, by the VMs' names, a page at a time; of each VM the newest hundred."""
    now = time.time_ns()
    since = utc_time(now - days * 86400 * 10**9) or ""
    found = timeline_page(context_of(request).house(), since, after=after, limit=limit + 1, match=match)
    following = found[limit - 1]["vm"] if len(found) > limit else None
    return {"since": since, "until": utc_time(now), "items": found[:limit], "next": following}


@router.get("/vms/{vm}", response_model=VmShape, dependencies=[needs(READ)])
def show_vm(request: Request, vm: NamePath) -> dict[str, Any]:
    """One VM."""
    return one_vm(context_of(request).house(), vm)


@router.get("/backups", response_model=BackupPage, dependencies=[needs(READ)])
def list_backups(request: Request, vm: Text = "", before: Text = "", limit: Limit = 100) -> dict[str, Any]:
    """The backups, of one VM or all, the newest first, a page at a time; as the catalogue has them."""
    cursor = None
    if before:
        when, comma, backup = before.partition(",")
        if not comma:
            raise HTTPException(400, "'before' is what 'next' was")
        cursor = (when, backup)
    found = context_of(request).house().catalogue.page(vm=vm, before=cursor, limit=limit + 1)
    last = found[limit - 1] if len(found) > limit else None
    return {"items": found[:limit], "next": f"{last['time']},{last['backup']}" if last else None}


@router.get("/backups/{backup}", response_model=BackupShape, dependencies=[needs(READ)])
def show_backup(request: Request, backup: NamePath) -> dict[str, Any]:
    """One backup, with the evidence that it is of one instant."""
    return context_of(request).house().catalogue.get(backup)


metrics_router = APIRouter()


@metrics_router.get("/metrics", dependencies=[needs(READ)], response_class=Response, include_in_schema=False)
def metrics(request: Request) -> Response:
    """For Prometheus."""
    from vmsnap.agent.metrics import CONTENT_TYPE, metrics_text

    return Response(metrics_text(context_of(request).house()), media_type=CONTENT_TYPE)
