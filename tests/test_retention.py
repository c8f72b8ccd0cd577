"""Which backups a policy keeps, and what prune does with the others."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_repository_faults import Failing
from tests.test_repository_keys import Counting, Dead, struck_at
from tests.test_storage_contract import Memory
from vmsnap.errors import (
    NewerFormat,
    ObjectRetained,
    RepositoryError,
    StorageError,
    StorageFull,
    UnknownBackup,
    UsageError,
)
from vmsnap.repository import BackupStats, Manifest, Repository
from vmsnap.repository.format import manifest_key
from vmsnap.repository.manifest import seal_manifest
from vmsnap.repository.pruning import forget_backups
from vmsnap.repository.retention import RetentionPolicy, Verdict, apply, duration_text

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Record:
    backup: str
    vm: str
    time: str
    tags: tuple[str, ...] = ()


def at(time: str, vm: str = "web1", *tags: str) -> Record:
    return Record(f"{vm}-{time}", vm, time, tags)


def kept(verdicts: Iterable[Verdict]) -> list[str]:
    return [verdict.time for verdict in verdicts if verdict.kept]


def every(step: timedelta, count: int) -> list[Record]:
    return [at(f"{NOW - number * step:%Y-%m-%dT%H:%M:%SZ}") for number in range(count)]


# -- rules


def test_the_last_n_are_kept_with_their_reasons() -> None:
    verdicts = apply(RetentionPolicy(last=2), every(timedelta(hours=1), 4), NOW)
    assert [verdict.reasons for verdict in verdicts] == [(), (), ("last 2 of 2",), ("last 1 of 2",)]
    assert [verdict.time[11:13] for verdict in verdicts] == ["09", "10", "11", "12"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("hourly", ["2026-01-04T23:59:59Z", "2026-01-05T00:59:00Z"]),
        ("daily", ["2026-01-04T23:59:59Z", "2026-01-05T00:59:00Z"]),
        ("weekly", ["2026-01-04T23:59:59Z", "2026-01-05T00:59:00Z"]),
        ("monthly", ["2025-12-31T23:00:00Z", "2026-01-05T00:59:00Z"]),
        ("yearly", ["2025-12-31T23:00:00Z", "2026-01-05T00:59:00Z"]),
    ],
)
def test_the_newest_of_each_bucket_is_kept(rule: str, expected: list[str]) -> None:
    # 5 January 2026 is a Monday; 31 December 2025 lies in the same ISO week as 4 January 2026.
    times = [
        "2025-12-31T22:00:00Z",
        "2025-12-31T23:00:00Z",
        "2026-01-04T23:10:00Z",
        "2026-01-04T23:59:59Z",
        "2026-01-05T00:00:00Z",
        "2026-01-05T00:59:00Z",
    ]
    policy = RetentionPolicy(**{rule: 2})  # type: ignore[arg-type]
    verdicts = apply(policy, map(at, times), NOW)
    assert kept(verdicts) == expected
    assert [v.reasons for v in verdicts if v.kept] == [(f"{rule} 2 of 2",), (f"{rule} 1 of 2",)]


def test_an_iso_week_goes_across_the_end_of_the_year() -> None:
    verdicts = apply(RetentionPolicy(weekly=9), map(at, ["2025-12-31T12:00:00Z", "2026-01-01T12:00:00Z"]), NOW)
    assert kept(verdicts) == ["2026-01-01T12:00:00Z"]


def test_buckets_are_those_of_utc_whatever_the_offset_in_the_record() -> None:
    times = ["2026-01-05T00:30:00+01:00", "2026-01-04T23:45:00Z", "2026-01-04T22:00:00"]
    assert kept(apply(RetentionPolicy(daily=5), map(at, times), NOW)) == ["2026-01-04T23:45:00Z"]


def test_days_without_a_backup_do_not_count() -> None:
    verdicts = apply(RetentionPolicy(daily=3), every(timedelta(days=10), 5), NOW)
    assert len(kept(verdicts)) == 3


def test_within_counts_from_now_and_its_end_is_kept() -> None:
    verdicts = apply(RetentionPolicy(within_seconds=2 * 86400), every(timedelta(days=1), 5), NOW)
    assert [verdict.reasons for verdict in verdicts] == [(), (), ("within 2 d",), ("within 2 d",), ("within 2 d",)]
    assert len(kept(apply(RetentionPolicy(within_seconds=10**18), every(timedelta(days=1), 5), NOW))) == 5


def test_tags_keep_and_all_reasons_are_named() -> None:
    records = [at("2026-01-01T00:00:00Z", "web1", "release", "v1"), at("2026-01-02T00:00:00Z")]
    verdicts = apply(RetentionPolicy(last=1, yearly=2, tags=frozenset({"release", "v1", "x"})), records, NOW)
    assert verdicts[0].reasons == ("tag release", "tag v1")
    assert verdicts[1].reasons == ("last 1 of 1", "yearly 1 of 2")


def test_each_vm_is_looked_at_by_itself() -> None:
    records = [at("2026-01-01T00:00:00Z", "a"), at("2026-01-02T00:00:00Z", "a"), at("2025-01-01T00:00:00Z", "b")]
    verdicts = apply(RetentionPolicy(last=1), records, NOW)
    assert [(v.vm, v.kept) for v in verdicts] == [("a", False), ("a", True), ("b", True)]


@pytest.mark.parametrize("policy", [RetentionPolicy(within_seconds=60), RetentionPolicy(tags=frozenset({"x"}))])
def test_the_newest_backup_of_a_vm_is_kept_whatever_the_rules_say(policy: RetentionPolicy) -> None:
    verdicts = apply(policy, [at("2020-01-01T00:00:00Z"), at("2020-01-02T00:00:00Z")], NOW)
    assert [verdict.reasons for verdict in verdicts] == [(), ("the newest",)]


def test_a_backup_whose_time_cannot_be_read_is_kept() -> None:
    verdicts = apply(RetentionPolicy(last=1), [at("yesterday"), at("2020-01-01T00:00:00Z")], NOW)
    assert {v.time: v.reasons for v in verdicts} == {
        "yesterday": ("its time cannot be read",),
        "2020-01-01T00:00:00Z": ("last 1 of 1",),
    }


@pytest.mark.parametrize("wrong", [{}, {"last": 0}, {"last": -1, "daily": 3}, {"within_seconds": 0, "last": 1}])
def test_a_policy_that_keeps_nothing_or_is_impossible_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        RetentionPolicy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(30 * 86400, "30 d"), (14 * 86400, "2 w"), (365 * 86400, "1 y"), (129600, "36 h"), (90, "90 s"), (120, "2 min")],
)
def test_durations_are_shown_in_their_largest_unit(seconds: int, text: str) -> None:
    assert duration_text(seconds) == text


# -- what holds for every policy and every set of backups

records = st.lists(
    st.builds(
        lambda number, vm, hours, tags: Record(
            f"{vm}-{number:06x}", vm, f"{NOW - timedelta(hours=hours):%Y-%m-%dT%H:%M:%SZ}", tuple(sorted(tags))
        ),
        st.integers(0, 0xFFFFFF),
        st.sampled_from("abc"),
        st.integers(-5, 24 * 500) | st.integers(0, 60),
        st.sets(st.sampled_from(["nightly", "release"])),
    ),
    unique_by=lambda record: record.backup,
    max_size=40,
)
counts = {name: st.integers(0, 6) for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")}
policies = st.fixed_dictionaries(
    {
        **counts,
        "within_seconds": st.none() | st.integers(1, 10**7),
        "tags": st.frozensets(st.sampled_from(["nightly", "release"])),
    }
).filter(lambda fields: any(fields.values()))


@given(policies, policies, records)
def test_a_policy_that_asks_for_more_never_removes_more(
    fields: dict[str, int], more: dict[str, int], backups: list[Record]
) -> None:
    lesser = RetentionPolicy(**fields)  # type: ignore[arg-type]
    greater = RetentionPolicy(
        **{name: max(getattr(lesser, name), more[name]) for name in counts},
        within_seconds=max(filter(None, (lesser.within_seconds, more["within_seconds"])), default=None),
        tags=lesser.tags | more["tags"],  # type: ignore[operator]
    )
    assert set(kept(apply(lesser, backups, NOW))) <= set(kept(apply(greater, backups, NOW)))


@given(policies, records)
def test_applied_twice_it_removes_nothing_the_second_time(fields: dict[str, int], backups: list[Record]) -> None:
    policy = RetentionPolicy(**fields)  # type: ignore[arg-type]
    first = {v.backup: v.reasons for v in apply(policy, backups, NOW) if v.kept}
    second = apply(policy, [record for record in backups if record.backup in first], NOW)
    assert {verdict.backup: verdict.reasons for verdict in second} == first


@given(policies, records, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_nothing_is_forgotten_or_made_up(
    fields: dict[str, int], backups: list[Record], order: random.Random
) -> None:
    policy = RetentionPolicy(**fields)  # type: ignore[arg-type]
    verdicts = apply(policy, backups, NOW)
    assert apply(policy, order.sample(backups, len(backups)), NOW) == verdicts
    assert sorted(v.backup for v in verdicts) == sorted(record.backup for record in backups)
    for vm in {record.vm for record in backups}:
        newest = max((record.time, record.backup) for record in backups if record.vm == vm)
        assert next(v for v in verdicts if v.backup == newest[1]).kept


# -- prune


def put(repository: Repository, vm: str, day: int, *tags: str) -> str:
    """Store a manifest without any image; returns its id."""
    manifest = Manifest(
        vm=vm,
        hypervisor="simulated",
        mode="live",
        tags=tags,
        backup=f"{vm}-202601{day:02}T000000Z-00000{len(tags)}",
        time=f"2026-01-{day:02}T00:00:00Z",
        stats=BackupStats(0, 0, 0.0),
        vmsnap="0",
    )
    repository.storage.put(*seal_manifest(repository.vault, manifest))
    return manifest.backup


def filled(storage: Memory) -> tuple[Repository, list[str]]:
    repository = Repository.create(storage)
    return repository, [put(repository, "web1", day) for day in range(1, 6)] + [put(repository, "Db2", 1, "release")]


def test_prune_removes_what_no_rule_keeps() -> None:
    repository, ids = filled(Memory())
    dry = repository.prune(RetentionPolicy(last=2), dry_run=True)
    assert dry.dry_run and [v.backup for v in dry.removed] == ids[:3] and len(repository.list()) == 6
    report = repository.prune(RetentionPolicy(last=2))
    assert replace(report, dry_run=True) == dry
    assert {manifest.backup for manifest in repository.list()} == {v.backup for v in report.kept} == set(ids[3:])
    assert repository.prune(RetentionPolicy(last=2)).removed == ()


def test_prune_looks_at_one_vm_or_some_tags_alone() -> None:
    repository, ids = filled(Memory())
    assert {v.vm for v in repository.prune(RetentionPolicy(last=1), vm="Db2").verdicts} == {"Db2"}
    tagged = [put(repository, "web1", day, "nightly") for day in (7, 8)]
    report = repository.prune(RetentionPolicy(last=1), tags=["nightly", "weekly"])
    assert [v.backup for v in report.removed] == tagged[:1] and [v.backup for v in report.kept] == tagged[1:]
    assert len(repository.list()) == len(ids) + 1


def test_prune_leaves_alone_what_it_cannot_read_and_says_so() -> None:
    storage = Memory()
    repository, ids = filled(storage)
    first, second = (manifest_key(backup) for backup in ids[:2])
    storage.raw[first] = storage.raw[first][:-1] + bytes([storage.raw[first][-1] ^ 1])
    newer = json.loads(repository.vault.open_object(second, storage.raw[second])) | {"version": 2}
    storage.raw[second] = repository.vault.seal_object(second, json.dumps(newer).encode())
    report = repository.prune(RetentionPolicy(last=1))
    assert [v.backup for v in report.removed] == ids[2:4]
    assert [damage.message.split()[0] for damage in report.unread] == [first, second]
    assert first in storage.raw and second in storage.raw
    assert not isinstance(report.unread[0], NewerFormat) and isinstance(report.unread[1], NewerFormat)


def test_one_manifest_of_a_newer_format_hides_no_other() -> None:
    storage = Memory()
    repository, ids = filled(storage)
    key = manifest_key(ids[0])
    storage.raw[key] = repository.vault.seal_object(key, b'{"version": 9, "shape": ["unknown"]}')
    told: list[str] = []
    assert len(repository.list(lambda damage: told.append(str(damage)))) == 5
    assert told == [f"{key} has format 9, newer than this vmsnap (install a newer one)"]
    with pytest.raises(RepositoryError, match="format 9"):
        repository.list()


def test_a_backup_that_vanishes_meanwhile_is_no_error() -> None:
    class Vanishing(Memory):
        def delete(self, key: str) -> None:
            for other in [key for key in self.raw if key.startswith("manifests/web1")][:3]:
                del self.raw[other]

    repository, ids = filled(Vanishing())
    assert [v.backup for v in repository.prune(RetentionPolicy(last=2)).removed] == ids[:3]
    assert len(repository.list()) == 3


def test_a_failure_in_the_middle_leaves_whole_backups_and_says_how_far_it_came() -> None:
    class Stubborn(Memory):
        deletes = 0

        def delete(self, key: str) -> None:
            self.deletes += 1
            if self.deletes == 2:
                raise StorageError("not now")
            super().delete(key)

    repository, ids = filled(Stubborn())
    with pytest.raises(StorageError, match="not now") as caught:
        repository.prune(RetentionPolicy(last=1))
    assert caught.value.__notes__ == ["1 of 4 backups were removed before that"]
    assert {manifest.backup for manifest in repository.list()} == set(ids[1:])
    assert len(repository.prune(RetentionPolicy(last=1)).removed) == 3


def test_a_backup_that_the_storage_keeps_does_not_keep_the_others() -> None:
    class Locked(Memory):
        def delete(self, key: str) -> None:
            if key == manifest_key(ids[1]):
                raise ObjectRetained(f"{key} is locked", until=datetime(2030, 1, 1, tzinfo=UTC))
            super().delete(key)

    ids: list[str] = []
    repository, ids = filled(Locked())
    with pytest.raises(ObjectRetained) as caught:
        repository.prune(RetentionPolicy(last=2))
    assert caught.value.__notes__ == ["2 of 3 backups were removed"]
    assert {manifest.backup for manifest in repository.list()} == {ids[1], *ids[3:]}


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_anywhere_each_backup_is_whole_or_gone_and_the_next_prune_finishes(when: str) -> None:
    for number in range(1, 100):
        storage = Counting()
        repository, ids = filled(storage)
        storage.strike = struck_at(number, when, Dead())
        try:
            repository.prune(RetentionPolicy(last=2))
        except Dead:
            done = False
        else:
            done = True
        storage.strike = None
        again = Repository.open(storage)
        left = {manifest.backup for manifest in again.list()}
        assert set(ids[3:]) <= left <= set(ids) and (not done or left == set(ids[3:]))
        again.prune(RetentionPolicy(last=2))
        assert {manifest.backup for manifest in again.list()} == set(ids[3:])
        if done:
            break
    assert done and number > 9


def test_prune_writes_nothing() -> None:
    storage = Failing()
    repository, _ = filled(storage)
    storage.at, storage.how, storage.puts = 0, "ever", 0
    assert repository.prune(RetentionPolicy(last=1)).removed
    with pytest.raises(StorageFull):
        put(repository, "web1", 9)


# -- forget


def test_single_backups_are_forgotten_all_or_none() -> None:
    storage = Memory()
    repository, ids = filled(storage)
    for wrong in ("web1", "", "../config", "web1-20260101T000000Z-ffffff"):
        with pytest.raises(UnknownBackup):
            forget_backups(repository, [ids[0], wrong])
    assert len(repository.list()) == 6
    storage.raw[manifest_key(ids[1])] = b"damaged"
    forget_backups(repository, [ids[0], ids[1], ids[5]])
    assert [manifest.backup for manifest in repository.list()] == ids[2:5]
