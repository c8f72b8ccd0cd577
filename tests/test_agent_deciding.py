"""What the agent decides, through time: nothing here sleeps, and nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.agent.deciding import (
    Limits,
    due_run,
    jobs_of_run,
    moment,
    nanoseconds,
    next_wake,
    prune_after,
    retry_of,
    startable,
)
from vmsnap.agent.jobs import BROKEN_OFF, DONE, FAILED, QUEUED, RUNNING, Job, NewJob
from vmsnap.agent.schedule import Schedule, fields_of, latest_slot, next_slot, schedule_from, slots_after
from vmsnap.agent.schedules import ScheduleRow
from vmsnap.agent.windows import may_start, next_opening, parse_window
from vmsnap.errors import UsageError

BERLIN = ZoneInfo("Europe/Berlin")
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc, arg-type]


def berlin(*parts: int, fold: int = 0) -> datetime:
    return datetime(*parts, tzinfo=BERLIN, fold=fold).astimezone(UTC)  # type: ignore[misc, arg-type]


def row(decided: datetime, cron: str = "30 2 * * *", timezone: str = "Europe/Berlin", **fields: object) -> ScheduleRow:
    return ScheduleRow(
        schedule_from({"name": "nightly", "cron": cron, "timezone": timezone, **fields}), nanoseconds(decided)
    )


def runs(start: ScheduleRow, looks: Sequence[datetime]) -> list[datetime]:
    """The slots that are run when the clock shows `looks`, one after the other."""
    found, now_row = [], start
    for now in looks:
        due = due_run(now_row, now)
        if due.slot is not None and not due.passed_over:
            found.append(due.slot)
        now_row = replace(now_row, decided_ns=nanoseconds(due.decided))
    return found


def each_minute(begin: datetime, end: datetime) -> list[datetime]:
    return [begin + MINUTE * n for n in range(int((end - begin) / MINUTE) + 1)]


def job(number: int, **fields: object) -> Job:
    values: Mapping[str, object] = {
        "job": number,
        "verb": "backup",
        "arguments": ("backup",),
        "state": QUEUED,
        "created_ns": 0,
        **fields,
    }
    return Job(**values)  # type: ignore[arg-type]


# -- time travel


def test_what_falls_into_the_hour_that_is_left_out_runs_right_behind_it() -> None:
    # Clocks go from 2:00 to 3:00 on 2026-03-29.
    found = runs(row(utc(2026, 3, 28, 12)), each_minute(utc(2026, 3, 28, 12), utc(2026, 3, 30, 12)))
    assert found == [berlin(2026, 3, 29, 3), berlin(2026, 3, 30, 2, 30)]


def test_what_falls_into_the_hour_that_comes_twice_runs_once() -> None:
    # Clocks go from 3:00 back to 2:00 on 2026-10-25.
    found = runs(row(utc(2026, 10, 24, 12)), each_minute(utc(2026, 10, 24, 12), utc(2026, 10, 26, 12)))
    assert found == [berlin(2026, 10, 25, 2, 30), berlin(2026, 10, 26, 2, 30)]


@pytest.mark.parametrize("day", [utc(2026, 3, 28, 22), utc(2026, 10, 24, 22)], ids=["forward", "back"])
def test_what_comes_every_half_hour_just_goes_on_when_clocks_change(day: datetime) -> None:
    found = runs(row(day, "*/30 * * * *"), each_minute(day, day + 8 * HOUR))
    assert found == [day + HOUR / 2 * n for n in range(1, 17)]


def test_a_leap_day_comes_every_fourth_year() -> None:
    leap = row(utc(2023, 1, 1), "0 4 29 2 *", "UTC")
    looks = [utc(2023, 1, 1) + DAY * n for n in range(9 * 366)]
    assert runs(leap, looks) == [utc(2024, 2, 29, 4), utc(2028, 2, 29, 4)]


def test_a_clock_that_is_set_back_a_little_makes_nothing_run_twice() -> None:
    looks = [
        berlin(2026, 6, 1, 2, 35),
        berlin(2026, 6, 1, 2, 10),
        *each_minute(berlin(2026, 6, 1, 2, 10), berlin(2026, 6, 1, 3)),
    ]
    assert runs(row(berlin(2026, 6, 1, 0)), looks) == [berlin(2026, 6, 1, 2, 30)]


def test_a_clock_that_was_years_ahead_does_not_silence_a_schedule() -> None:
    wrong, right = berlin(2031, 1, 1, 5), berlin(2026, 6, 1, 1)
    found = runs(row(berlin(2026, 6, 1, 0)), [wrong, *each_minute(right, right + 2 * HOUR)])
    assert found == [berlin(2031, 1, 1, 2, 30), berlin(2026, 6, 1, 2, 30)]


def test_a_week_of_missed_slots_is_caught_up_with_one_run() -> None:
    down, up = utc(2026, 6, 1), utc(2026, 6, 8, 12)
    due = due_run(row(down), up)
    assert due.slot == berlin(2026, 6, 8, 2, 30) and due.missed and not due.passed_over
    assert runs(row(down), each_minute(up, up + HOUR)) == [berlin(2026, 6, 8, 2, 30)]


def test_missed_slots_are_passed_over_where_that_is_wanted_but_not_one_that_is_a_little_late() -> None:
    strict = row(utc(2026, 6, 1), catch_up=False)
    assert runs(strict, [utc(2026, 6, 8, 12), *each_minute(utc(2026, 6, 8, 12), utc(2026, 6, 8, 14))]) == []
    assert runs(row(berlin(2026, 6, 1, 1), catch_up=False), [berlin(2026, 6, 1, 2, 38)]) == [berlin(2026, 6, 1, 2, 30)]


def test_a_schedule_that_rests_runs_nothing_and_wakes_nobody() -> None:
    rests = replace(row(utc(2026, 6, 1)), paused=True)
    assert runs(rests, each_minute(utc(2026, 6, 1), utc(2026, 6, 3))) == []
    assert next_wake(utc(2026, 6, 1), [rests]) is None
    assert next_wake(utc(2026, 6, 1), [rests, row(utc(2026, 6, 1))]) == berlin(2026, 6, 1, 2, 30)


_CRONS = st.sampled_from(
    [
        "* * * * *",
        "*/7 * * * *",
        "0 * * * *",
        "30 2 * * *",
        "0 3 * * sun",
        "15 1,2,3 * * *",
        "0 0 1 * *",
        "0 12 29 2 *",
        "5 0-6/2 * * mon-fri",
    ]
)
_ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Sao_Paulo"]
)
_TIMES = st.datetimes(datetime(2023, 1, 1), datetime(2027, 12, 31)).map(lambda at: at.replace(tzinfo=UTC))


@given(cron=_CRONS, zone=_ZONES, begin=_TIMES, steps=st.lists(st.integers(1, 3 * 86400), max_size=12))
@settings(max_examples=150)
def test_whenever_one_looks_each_slot_runs_at_most_once_and_the_last_one_always_does(
    cron: str, zone: str, begin: datetime, steps: list[int]
) -> None:
    looks = [begin + timedelta(seconds=sum(steps[: n + 1])) for n in range(len(steps))]
    found = runs(row(begin, cron, zone), looks)
    assert found == sorted(set(found))
    schedule = row(begin, cron, zone).schedule
    for before, now in zip([begin, *looks], looks, strict=False):
        due = latest_slot(schedule, moment(nanoseconds(before)), now)
        assert due is None or due in found
    assert all(begin < slot <= looks[-1] for slot in found)


@given(cron=_CRONS, zone=_ZONES, begin=_TIMES, length=st.integers(0, 40 * 86400))
@settings(max_examples=60)
def test_the_latest_slot_is_the_last_of_all(cron: str, zone: str, begin: datetime, length: int) -> None:
    schedule = row(begin, cron, zone).schedule
    until = begin + timedelta(seconds=length if not cron.startswith("*") else length // 40)
    every = slots_after(schedule, begin, until)
    assert latest_slot(schedule, begin, until) == (every[-1] if every else None)
    following = next_slot(schedule, begin)
    assert following is not None and following > begin and (not every or following == every[0])


# -- what comes of a slot

VMS = {name: None for name in ("db1", "web1", "web2", "web10")}
SLOT = utc(2026, 6, 1, 2)


def names(schedule: Schedule, slot: datetime = SLOT, open_jobs: Sequence[Job] = (), **last: int) -> list[str]:
    return [new.vm for new in jobs_of_run(schedule, slot, slot, VMS, last, open_jobs)]


def schedule(**fields: object) -> Schedule:
    return schedule_from({"name": "nightly", "cron": "0 2 * * *", "timezone": "UTC", **fields})


def test_vms_come_as_the_patterns_stand_and_then_by_name_each_once() -> None:
    assert names(schedule(vms=["web*", "*"])) == ["web1", "web10", "web2", "db1"]
    assert names(schedule(vms=["web?"])) == ["web1", "web2"] and names(schedule(vms=["nobody"])) == []


def test_vms_are_meant_by_the_tags_that_their_hypervisor_gives_them_too() -> None:
    tags = {"web1": {"gold", "shop"}, "db1": {"gold"}, "elsewhere": {"gold"}}

    def meant(*patterns: str, known: Mapping[str, set[str]] | None = tags) -> list[str]:
        found = jobs_of_run(schedule(vms=list(patterns)), SLOT, SLOT, VMS, {}, [], tags=known)
        return [new.vm for new in found]

    assert meant("tag:gold") == ["db1", "web1"] and meant("tag:shop", "tag:gold") == ["web1", "db1"]
    assert meant("tag:g*", "web2") == ["db1", "web1", "web2"] and meant("tag:") == meant("gold") == []
    assert meant("tag:gold", known=None) == []
    assert schedule(vms=["tag:gold"]).names_tags and not schedule(vms=["gold"]).names_tags


def test_the_one_whose_last_success_is_oldest_comes_first_and_one_without_any_before_it() -> None:
    assert names(schedule(order="least-recent"), web1=30, db1=10, web10=20) == ["web2", "db1", "web10", "web1"]


def test_a_random_order_is_another_one_each_night_and_the_same_for_who_asks_again() -> None:
    nights = [names(schedule(order="random"), SLOT + DAY * n) for n in range(20)]
    assert all(sorted(night) == sorted(VMS) for night in nights) and len(set(map(tuple, nights))) > 5
    assert nights == [names(schedule(order="random"), SLOT + DAY * n) for n in range(20)]


def test_jitter_delays_each_by_its_own_time_and_never_by_more() -> None:
    found = jobs_of_run(schedule(jitter_seconds=600), SLOT, SLOT, VMS, {}, [])
    delays = [moment(new.not_before_ns) - SLOT for new in found]
    assert len(set(delays)) == 4 and all(timedelta(0) <= delay <= 10 * MINUTE for delay in delays)


def test_a_vm_whose_job_of_this_schedule_is_still_open_gets_no_second_one() -> None:
    open_jobs = [job(1, vm="web1", schedule="nightly", state=RUNNING), job(2, vm="web2", schedule="other")]
    assert names(schedule(), open_jobs=open_jobs) == ["db1", "web10", "web2"]


def test_the_newest_backup_of_each_vm_that_has_one_is_verified() -> None:
    proof = schedule(verb="verify", boot=True)
    found = jobs_of_run(proof, SLOT, SLOT, VMS, {}, [], newest_backup={"web1": "web1-20260101T000000Z-123456"})
    assert [new.arguments for new in found] == [("verify", "--boot", "--", "web1-20260101T000000Z-123456")]


def test_a_backup_of_a_schedule_carries_its_tag_and_its_rules_of_retention_count_for_that_alone() -> None:
    kept = schedule(tags=["gold"], keep={"daily": 7, "weekly": 4}, mode="consistent")
    (new,) = jobs_of_run(replace(kept, vms=("db1",)), SLOT, SLOT, VMS, {}, [])
    words = " ".join(new.arguments)
    assert words == "backup --mode consistent --max-pause 5.0 --tag schedule:nightly --tag gold -- db1"
    done = job(1, vm="db1", state=DONE, schedule="nightly", repository="/r")
    prune = prune_after(done, kept)
    assert prune is not None and prune.repository == "/r"
    assert " ".join(prune.arguments) == "prune --keep-daily 7 --keep-weekly 4 --tag schedule:nightly --vm db1"
    assert prune_after(replace(done, state=FAILED), kept) is None and prune_after(done, schedule()) is None


# -- failures


def test_failures_are_tried_again_ever_later_and_not_for_ever() -> None:
    patient = schedule(retries=12, retry_seconds=60)
    now, waits, failed = SLOT, [], job(1, state=FAILED, exit_code=1, vm="db1", schedule="nightly")
    while (new := retry_of(failed, patient, now)) is not None:
        waits.append((moment(new.not_before_ns) - now).total_seconds())
        failed = replace(failed, attempt=new.attempt)
    assert waits == [60.0 * 2**n for n in range(9)] + [21600.0] * 3


@pytest.mark.parametrize(
    ("state", "code", "again"),
    [
        (FAILED, 1, True),
        (FAILED, 5, True),
        (BROKEN_OFF, None, True),
        (FAILED, 2, False),
        (FAILED, 3, False),
        (FAILED, 4, False),
        (FAILED, 6, False),
        (DONE, 0, False),
        ("cancelled", 130, False),
        ("cancelled", None, False),
    ],
)
def test_what_another_try_can_cure_is_tried_again_and_nothing_else(state: str, code: int | None, again: bool) -> None:
    ended = job(1, state=state, exit_code=code, schedule="nightly")
    assert (retry_of(ended, schedule(), SLOT) is not None) == again
    assert retry_of(ended, None, SLOT) is None, "what nobody scheduled is for whoever asked"


# -- what may start


WIDE = Limits(10, 10)


def start(jobs: Sequence[Job], now: datetime = SLOT, limits: Limits = WIDE, **schedules: Schedule) -> list[int]:
    return [each.job for each in startable(now, jobs, limits, schedules)[0]]


def test_a_recovery_of_the_host_comes_before_everything_and_alone() -> None:
    recover = job(9, verb="recover")
    assert start([job(1, vm="a"), recover]) == [9]
    assert start([job(1, vm="a"), replace(recover, state=RUNNING)]) == []
    assert start([job(1, vm="a"), replace(recover, vm="b")]) == [1, 9], "one of a single VM disturbs nobody"


def test_what_somebody_asked_for_comes_before_what_a_schedule_did_and_asks_no_window() -> None:
    closed = schedule(never=["0:00-24:00"])
    queued = [job(1, vm="a", schedule="nightly", slot_ns=1), job(2, vm="b"), job(3, vm="c", schedule="nightly")]
    assert start(queued, nightly=closed) == [2, 3]
    assert start(queued, nightly=schedule(at_once=2)) == [2, 3, 1]
    assert start(queued, nightly=schedule()) == [2, 3], "one of its jobs at once"
    assert start(queued, limits=Limits(1, 10), nightly=schedule()) == [2]


def test_what_is_due_in_a_blackout_waits_until_it_is_over() -> None:
    dark = schedule(never=["mon-fri 01:00-03:30"])
    chosen, wake = startable(SLOT, [job(1, vm="a", schedule="nightly", slot_ns=1)], Limits(), {"nightly": dark})
    assert not chosen and wake == utc(2026, 6, 1, 3, 30)
    assert start([job(1, vm="a", schedule="nightly", slot_ns=1)], utc(2026, 6, 1, 3, 30), nightly=dark) == [1]


def test_jobs_of_a_schedule_that_rests_rest_but_not_what_was_asked_for() -> None:
    queued = [job(1, vm="a", schedule="nightly", slot_ns=1), job(2, vm="b", schedule="nightly")]
    chosen, _ = startable(SLOT, queued, Limits(), {"nightly": schedule(at_once=5)}, {"nightly"})
    assert [each.job for each in chosen] == [2]


_JOBS = st.builds(
    lambda state, vm, repository, name, delay: {
        "state": state,
        "vm": vm,
        "repository": repository,
        "schedule": name,
        "slot_ns": 1 if name else None,
        "not_before_ns": nanoseconds(SLOT + timedelta(seconds=delay)),
    },
    st.sampled_from([QUEUED, QUEUED, RUNNING]),
    st.sampled_from(["", "a", "b", "c", "d"]),
    st.sampled_from(["r1", "r2"]),
    st.sampled_from(["", "one", "two"]),
    st.sampled_from([-60, 0, 60]),
)


@given(st.lists(_JOBS, max_size=14), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_no_limit_is_ever_passed_and_nothing_waits_without_a_reason(
    wanted: list[dict[str, object]], at_once: int, per_repository: int, per_pool: int
) -> None:
    pools = {"a": {"/srv"}, "b": {"/srv", "/dev/vg0"}, "c": {"/dev/vg0"}}
    jobs = [job(n, **fields) for n, fields in enumerate(wanted)]
    schedules = {"one": replace(schedule(), name="one"), "two": replace(schedule(), name="two", at_once=2)}
    chosen, wake = startable(SLOT, jobs, Limits(at_once, per_repository, per_pool), schedules, pools=pools)
    was = [each for each in jobs if each.state == RUNNING]
    runs_then = was + chosen
    assert not chosen or len(runs_then) <= at_once
    for new in chosen:
        assert moment(new.not_before_ns) <= SLOT
        assert not new.vm or sum(each.vm == new.vm for each in runs_then) == 1
        assert sum(each.repository == new.repository for each in runs_then) <= per_repository
        for pool in pools.get(new.vm, ()):
            assert sum(pool in pools.get(each.vm, ()) for each in runs_then) <= per_pool
        if new.schedule:
            assert sum(each.schedule == new.schedule for each in runs_then) <= schedules[new.schedule].at_once
    late = [each for each in jobs if each.state == QUEUED and moment(each.not_before_ns) > SLOT]
    assert wake == (SLOT + MINUTE if late else None)
    if not was and any(each.state == QUEUED for each in jobs) and len(late) < len(jobs):
        assert chosen, "on an idle host something that is due starts"


# -- windows


@pytest.mark.parametrize(
    "text",
    ["", "22-6", "25:00-26:00", "10:00", "10:61-11:00", "foo 10:00-11:00", "mon- 1:00-2:00", "mon..tue 1:00-2:00"],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no window"):
        parse_window(text)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    night = parse_window("fri 22:00-06:00")
    assert night.holds(datetime(2026, 6, 5, 23)) and night.holds(datetime(2026, 6, 6, 5, 59))
    assert not night.holds(datetime(2026, 6, 6, 6)) and not night.holds(datetime(2026, 6, 6, 23))
    assert parse_window("sat-mon 0:00-24:00").days == {5, 6, 0} and parse_window("0:00-24:00").holds(
        datetime(2026, 1, 1)
    )


_WINDOWS = st.lists(
    st.builds(
        "{}{}:{:02}-{}:{:02}".format,
        st.sampled_from(["", "mon-fri ", "sat,sun ", "wed "]),
        st.integers(0, 23),
        st.sampled_from([0, 30]),
        st.integers(0, 23),
        st.sampled_from([0, 30]),
    ),
    max_size=3,
)


@given(now=_TIMES, zone=_ZONES, only=_WINDOWS, never=_WINDOWS)
@settings(max_examples=150)
def test_the_next_opening_is_the_first_moment_at_which_a_job_may_start(
    now: datetime, zone: str, only: list[str], never: list[str]
) -> None:
    now = now.replace(second=0, microsecond=0)
    where, windows, dark = ZoneInfo(zone), [parse_window(text) for text in only], [parse_window(text) for text in never]
    found = next_opening(now, where, windows, dark)
    quarter = timedelta(minutes=15)
    grid = [now - timedelta(minutes=now.minute % 15) + quarter * n for n in range(7 * 24 * 4)]
    first = next((at for at in grid if at >= now and may_start(at, where, windows, dark)), None)
    if found is None:
        assert first is None
    else:
        assert may_start(found, where, windows, dark)
        assert first is None or found <= first
        assert not any(may_start(at, where, windows, dark) for at in grid if now <= at < found)


# -- what is no schedule


@pytest.mark.parametrize(
    ("fields", "names_it"),
    [
        ({"cron": "* * * *"}, "five fields"),
        ({"cron": "61 * * * *"}, "no cron expression"),
        ({"cron": "0 0 30 2 *"}, "cron"),
        ({"cron": "* * * * * *"}, "five fields"),
        ({"timezone": "Mars/Olympus"}, "no time zone"),
        ({"timezone": "../../etc/passwd"}, "no time zone"),
        ({"order": "by size"}, "no order"),
        ({"vms": []}, "names no VM"),
        ({"vms": ["--all"]}, "no VM pattern"),
        ({"tags": ["a\nb"]}, "no tag"),
        ({"keep": {"daly": 7}}, "daly"),
        ({"at_once": 0}, "at_once"),
        ({"at_once": "two"}, "at_once"),
        ({"colour": "red"}, "colour"),
        ({"name": "../x"}, "schedule name"),
        ({"only": ["late"]}, "no window"),
    ],
)
def test_what_is_no_schedule_is_refused_and_the_message_names_it(fields: dict[str, object], names_it: str) -> None:
    with pytest.raises(UsageError) as told:
        schedule(**fields)
    assert names_it in str(told.value) and told.value.cure


def test_a_schedule_is_kept_with_all_its_fields_those_that_were_not_given_too() -> None:
    short = schedule()
    assert set(fields_of(short)) == set(Schedule.__dataclass_fields__)
    assert schedule_from(fields_of(short)) == short


def test_a_new_job_is_what_a_job_was() -> None:
    assert {field for field in NewJob.__dataclass_fields__} < {field for field in Job.__dataclass_fields__}
