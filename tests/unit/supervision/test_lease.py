"""The lease: what is written, how a rank judges it, and what needs no space on the disk."""

import pytest

from ds_dpo.supervision.lease import (
    Lease,
    Notice,
    Outcome,
    end_lease,
    leases,
    read_notice,
    read_outcome,
    record_outcome,
)
from ds_dpo.supervision.lease_watch import LeaseJudge


def notice(count):
    return Notice(word="run", count=count, launcher="head 1")


def test_each_renewal_changes_it_and_none_its_size(tmp_path):
    lease = Lease(tmp_path)
    (path,) = leases(tmp_path)
    size, inode = path.stat().st_size, path.stat().st_ino
    counts = []
    for word in ("run", "stop", "hang", "end"):
        lease.word = word
        lease.renew()
        found = read_notice(path)
        assert found.word == word
        counts.append(found.count)
    assert counts == sorted(set(counts))
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode), "a full disk has no room for more"
    end_lease(path)
    assert read_notice(path).word == "end"
    lease.remove()
    assert list(tmp_path.iterdir()) == []
    path.parent.mkdir()
    with pytest.raises(FileNotFoundError):
        lease.renew()  # it does not come back


def test_the_first_failure_that_is_recorded_stands(tmp_path):
    path = Lease(tmp_path).path
    outcome = path.with_suffix(".outcome")
    size = outcome.stat().st_size
    assert read_outcome(path) is None
    done, hang, late = (
        Outcome(status=status, rank=rank, how=how)
        for status, rank, how in [(0, 0, "done"), (70, 3, "a step has " + "x" * 500), (1, 2, "late")]
    )
    record_outcome(path, done)
    assert read_outcome(path) == done
    record_outcome(path, hang)
    record_outcome(path, late)
    found = read_outcome(path)
    assert (found.status, found.rank) == (70, 3)
    assert found.how.startswith("a step has xxx")
    assert outcome.stat().st_size == size


def test_a_lease_is_lost_after_its_seconds_without_a_change():
    judge = LeaseJudge(20)
    for count in range(5):
        judge.see(notice(count))
        judge.wait(2, has_looked=True)
        assert judge.loss is None
    for _ in range(9):  # 2 s have passed since the last change was seen
        judge.see(notice(4))
        judge.wait(2, has_looked=True)
    assert judge.loss is None, "20 s"
    judge.wait(1, has_looked=True)
    assert judge.loss == "it was not renewed for 20 s"
    judge.see(notice(5))
    assert judge.loss is None


def test_a_lease_that_never_changed_is_lost_in_half_the_time():
    judge = LeaseJudge(20)
    for seconds in range(1, 12):
        judge.see(notice(7))
        judge.wait(1, has_looked=True)
        assert (judge.loss is None) == (seconds <= 10)


def test_a_file_that_is_gone_is_a_lease_that_is_not_renewed():
    judge = LeaseJudge(10)
    judge.see(notice(1))
    judge.see(notice(2))
    for _ in range(11):
        judge.see(None)
        judge.wait(1, has_looked=True)
    assert judge.loss == "it was not renewed for 10 s"


def test_time_that_a_process_was_stopped_for_or_a_disk_did_not_answer_is_not_the_launcher_s():
    judge = LeaseJudge(20)
    judge.see(notice(1))
    judge.see(notice(2))
    judge.wait(3600, has_looked=True)  # stopped, and continued
    assert judge.loss is None
    for _ in range(100):
        judge.wait(1, has_looked=False)
    assert judge.loss is None
    judge.see(notice(3))
    for _ in range(121):
        judge.wait(1, has_looked=False)
    assert judge.loss == "it could not be read for 120 s"
