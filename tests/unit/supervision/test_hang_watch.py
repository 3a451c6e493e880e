"""How long a step may take, and what a rank that hangs leaves."""

import subprocess
import sys
import threading

from ds_dpo.supervision.hang_watch import HangWatch, MicroBatchTimes, write_stacks


def test_a_micro_batch_may_take_a_multiple_of_the_median_and_the_first_one_longer():
    times = MicroBatchTimes(factor=10, floor_seconds=60)
    assert times.limit == 180, "nothing is known yet"
    times.add(900)
    assert times.limit == 180, "the first step may have compiled: it is no measure"
    times.end_step()
    assert times.limit == 180
    for seconds in (8, 7, 300):
        times.add(seconds)
    assert times.limit == 80, "10 x the median of 7, 8, 300"
    for _ in range(50):
        times.add(2)
    assert times.limit == 60, "the floor; the last 50 count"


SEIZED = """
import ctypes
from ds_dpo.supervision.hang_watch import HangWatch, MicroBatchTimes
hang = HangWatch(MicroBatchTimes(factor=2, floor_seconds=0.5), long_work_seconds=100, ends_seized=True, on_hang=print)
hang.start()
mutex = ctypes.create_string_buffer(64)
lock = ctypes.PyDLL(None).pthread_mutex_lock  # which does not let go of the interpreter
with hang.pause("saving"):
    while True:
        lock(mutex)
"""


def test_a_process_whose_interpreter_is_held_for_ever_ends_with_its_stacks():
    done = subprocess.run([sys.executable, "-c", SEIZED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Timeout (0:00:01.500000)!" in done.stderr
    assert 'File "<string>", line 10 in <module>' in done.stderr


class Clock:
    """Stands for time.monotonic, and for a thread's waiting."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def watch(monkeypatch):
    clock, told = Clock(), []
    monkeypatch.setattr("ds_dpo.supervision.hang_watch.time.monotonic", clock)
    hang = HangWatch(
        MicroBatchTimes(factor=2, floor_seconds=10), long_work_seconds=100, ends_seized=False, on_hang=told.append
    )
    return clock, told, hang


def test_only_time_between_beats_counts_and_long_work_has_its_own(monkeypatch):
    clock, _, hang = watch(monkeypatch)
    hang.beat()
    clock.now += 1
    hang.beat()
    hang.end_step()
    for seconds in (20, 20):
        with hang.pause("saving"):
            clock.now += 500
        clock.now += seconds
        hang.beat()
    hang.look(39)
    assert hang.reason is None, "2 x 20 s: what was saved in between is not the step's"
    hang.look(2)
    assert hang.reason == "a micro-batch has taken more than 40 s"
    with hang.pause("saving"):
        hang.look(100)
        assert hang.reason is None
        hang.look(1)
        assert hang.reason == "saving has taken more than 100 s"
    assert hang.reason is None, "a micro-batch begins anew"


def test_a_step_of_many_micro_batches_is_no_hang_however_long_it_takes(monkeypatch):
    """2048 micro-batches of 1 s, as of sdxl_pickapic on one GPU, with a floor of 10 s, and updates of 9 s."""
    clock, _, hang = watch(monkeypatch)
    hang.start()
    hang.close()
    for _ in range(2):
        for seconds in (*[1.0] * 2047, 10.0):
            clock.now += seconds
            hang.look(seconds)
            assert hang.reason is None
            hang.beat()
        clock.now += 9
        hang.look(9)
        hang.end_step()
    hang.look(10)
    assert hang.reason is None
    hang.look(1)
    assert hang.reason == "a micro-batch has taken more than 10 s", "the floor applies to one of them"


def test_the_stacks_of_all_threads_are_appended(tmp_path):
    there, go = threading.Event(), threading.Event()

    def wait_in_another_thread():
        there.set()
        go.wait()

    other = threading.Thread(target=wait_in_another_thread)
    other.start()
    there.wait()
    path = tmp_path / "stacks" / "rank_3.txt"
    for reason in ("a micro-batch has taken more than 40 s", "another rank has found a hang"):
        write_stacks(path, reason)
    go.set()
    other.join()
    text = path.read_text()
    assert text.index("a micro-batch has taken more than 40 s") < text.index("another rank has found a hang")
    assert text.count("in wait_in_another_thread") == 2
    assert text.count("in test_the_stacks_of_all_threads_are_appended") == 2


def test_stacks_go_to_standard_error_where_the_disk_refuses(tmp_path, capfd):
    (tmp_path / "stacks").write_text("a file where a folder is wanted")
    write_stacks(tmp_path / "stacks" / "rank_0.txt", "a micro-batch has taken more than 40 s")
    said = capfd.readouterr().err
    assert "rank_0.txt cannot be written (File exists)" in said
    assert "in test_stacks_go_to_standard_error" in said
