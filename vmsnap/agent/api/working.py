"""Routes of jobs: asking for them, watching them, stopping them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from vmsnap.agent.api.context import Context, caller_of, context_of, needs, require
from vmsnap.agent.api.request import Request as VerbRequest
from vmsnap.agent.api.shapes import JobDetail, JobList, JobPage, JobShape
from vmsnap.agent.api.verbs import VERBS
from vmsnap.agent.house import House
from vmsnap.agent.jobs import Job, NewJob
from vmsnap.agent.notices import job_document
from vmsnap.agent.processes import JobFiles
from vmsnap.agent.tokens import ADMIN, OPERATE, READ

_LOOKS_EACH_SECONDS = 0.4
_KEEPS_ALIVE_EACH = 30
"""After so many looks without news a comment is sent, so that nobody between us takes the connection for dead."""

router = APIRouter(prefix="/api/v1/jobs")
Number = Annotated[int, Path(ge=1, le=2**62)]
Text = Annotated[str, Query(max_length=200)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]


@router.get("", response_model=JobPage, dependencies=[needs(READ)])
def list_jobs(
    request: Request,
    before: Annotated[int | None, Query(ge=0, le=2**62)] = None,
    vm: Text = "",
    state: Text = "",
    schedule: Text = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> dict[str, Any]:
    """Jobs, the newest first, a page at a time."""
    jobs = context_of(request).house().jobs
    found = jobs.page(before=before, limit=limit + 1, vm=vm, state=state, schedule=schedule)
    return {
        "items": [job_document(job) for job in found[:limit]],
        "next": found[limit - 1].job if len(found) > limit else None,
    }


@router.get("/{job}", response_model=JobDetail, dependencies=[needs(READ)])
def show_job(request: Request, job: Number) -> dict[str, Any]:
    """One job, with how far it has come or what came of it."""
    return job_detail(context_of(request).house(), job)


@router.get(
    "/{job}/events",
    dependencies=[needs(READ)],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def watch_job(request: Request, job: Number) -> StreamingResponse:
    """One job as server-sent events: each `job` event has what `GET /jobs/{job}` answers; ends when the job does."""
    context = context_of(request)
    await run_in_threadpool(lambda: context.house().jobs.get(job))

    def look() -> tuple[str, bool]:
        found = job_detail(context.house(), job)
        return json.dumps(found), found["ended"] is not None

    return _stream(context, "job", look)


events_router = APIRouter(prefix="/api/v1")


@events_router.get(
    "/events",
    dependencies=[needs(READ)],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def watch_all(request: Request) -> StreamingResponse:
    """All jobs that are open, and the last twenty, as server-sent events: a `jobs` event whenever something changes."""
    context = context_of(request)

    def look() -> tuple[str, bool]:
        house = context.house()
        shown = {job.job: job for job in [*house.jobs.page(limit=20), *house.jobs.open()[:200]]}
        return json.dumps([_with_progress(house, job) for _, job in sorted(shown.items(), reverse=True)]), False

    return _stream(context, "jobs", look)


@router.post(
    "/{job}/cancel",
    response_model=JobDetail,
    dependencies=[needs(OPERATE)],
    responses={409: {"description": "it has ended"}},
)
def cancel_job(request: Request, job: Number) -> dict[str, Any]:
    """Take a queued job back, or ask a running one to stop: it cleans up first, and the guest runs.

    Operators stop what operators may start, the rest is for administrators.
    """
    context, caller = context_of(request), caller_of(request)
    house = context.house()
    found = house.jobs.get(job)
    if found.verb not in ("backup", "verify", "check", "doctor", "refresh"):
        require(request, ADMIN)
    if found.ended:
        raise HTTPException(409, f"job {job} has ended already")
    if not house.jobs.cancel_queued(job, f"taken back by {caller.name}"):
        context.cancel(house.jobs.get(job))
    context.wake()
    return job_detail(house, job)


def _asking(model: type[VerbRequest]) -> Callable[..., Any]:
    def ask(request: Request, body: model, key: Key = None) -> Any:  # type: ignore[valid-type]
        context = context_of(request)
        asked: VerbRequest = body
        caller = require(request, asked.needs())
        house = context.house()
        new = NewJob(
            verb=model.verb.removeprefix("agent-"),
            arguments=asked.arguments(),
            vm=asked.about(),
            repository=_repository(house, asked),
            requester=caller.name,
            # Whose it is stands in it: nobody finds another one's job by guessing.
            key=None if key is None else f"{caller.name}\0{key}",
        )
        job, is_new = house.jobs.add(new)
        context.wake()
        return JSONResponse(job_document(job), 202 if is_new else 200, {"Location": f"/api/v1/jobs/{job.job}"})

    ask.__doc__ = f"{model.__doc__}\n\nAnswers with the job at once; watch it for what comes of it."
    ask.__name__ = model.verb.replace("-", "_")
    return ask


for _model in VERBS:
    router.add_api_route(
        f"/{_model.verb.removeprefix('agent-')}",
        _asking(_model),
        methods=["POST"],
        status_code=202,
        response_model=JobShape,
        responses={200: {"model": JobShape, "description": "asked before with the same Idempotency-Key"}},
    )


def _repository(house: House, asked: VerbRequest) -> str:
    if not asked.uses_repository:
        if asked.repository:
            raise HTTPException(400, f"{asked.verb} uses no repository")
        return ""
    known = house.repositories()
    # Else whoever may start a backup could have guests' memory sent anywhere.
    named = [*([asked.repository] if asked.repository is not None else []), *asked.other_repositories()]
    if not set(named) <= set(known):
        raise HTTPException(400, "the agent does not work with that repository; see 'repositories' in its settings")
    if asked.repository is None:
        if not house.blueprint.repository and asked.verb != "doctor":
            raise HTTPException(400, "no repository is configured, and none was named")
        return house.blueprint.repository
    return asked.repository


def job_detail(house: House, number: int) -> dict[str, Any]:
    """A job with progress and result; see `JobDetail`.

    :raises NotFound: there is none of that number
    """
    job = house.jobs.get(number)
    return {**_with_progress(house, job), "result": house.jobs.result(number) if job.ended else None}


def job_list(jobs: list[Job]) -> JobList:
    """Jobs as the API answers with them."""
    return JobList(items=[JobShape(**job_document(job)) for job in jobs])


def _with_progress(house: House, job: Job) -> dict[str, Any]:
    progress = None if job.ended else JobFiles.of(house.blueprint.state_dir, job.job).read_progress()
    return {**job_document(job), "progress": progress}


def _stream(context: Context, event: str, look: Callable[[], tuple[str, bool]]) -> StreamingResponse:
    if not context.streams.acquire(blocking=False):
        raise HTTPException(429, "too many are watching", headers={"Retry-After": "5"})

    async def events() -> AsyncIterator[str]:
        try:
            last, quiet = "", 0
            while not context.stopping.is_set():
                text, ended = await run_in_threadpool(look)
                quiet = 0 if text != last else quiet + 1
                if text != last:
                    last = text
                    yield f"event: {event}\ndata: {text}\n\n"
                elif quiet % _KEEPS_ALIVE_EACH == 0:
                    yield ": still here\n\n"
                if ended:
                    return
                await asyncio.sleep(_LOOKS_EACH_SECONDS)
        finally:
            context.streams.release()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
