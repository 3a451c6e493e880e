"""Ranks that meet: who is missing, who differs, who sees another folder, and whose port it is."""

import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import LaunchError
from ds_dpo.launch.meeting import PATIENT_SECONDS, USUAL_SECONDS, Attendee, judge, meeting, spans, usual_seconds
from ds_dpo.launch.report import ALIKE

SECONDS = 2.0


def a_place(rank=0, *, world_size=2, port=29500):
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
    )


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(ranks, output_dirs, port, *, world_size=2, options=(), seconds=SECONDS):
    """Let these ranks meet, each on a thread; return by rank what each of them heard: an error, or None."""
    heard = {}
    everyone = threading.Barrier(len(ranks))

    def attend(rank, output_dir, further):
        arguments = [f"--output_dir={output_dir}", f"--supervision.meeting_seconds={seconds}", *further]
        config = load_config(["--config=miniature", *arguments]).config
        try:
            with meeting(config, a_place(rank, world_size=world_size, port=port), {}):
                everyone.wait(60)  # rank 0 holds what they met through
            heard[rank] = None
        except LaunchError as error:
            heard[rank] = error

    further = [*options, *[()] * len(ranks)]
    threads = [threading.Thread(target=attend, args=each) for each in zip(ranks, output_dirs, further, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return heard


def test_ranks_that_fit_go_on_and_leave_no_folder(tmp_path, port):
    assert meet([0, 1, 2], [tmp_path / "new" / "run"] * 3, port, world_size=3, seconds=60) == dict.fromkeys((0, 1, 2))
    assert list(tmp_path.iterdir()) == []


def test_one_rank_alone_meets_nobody(tmp_path):
    with meeting(load_config([f"--output_dir={tmp_path}"]).config, a_place(world_size=1), {}):
        pass


def test_missing_ranks_are_named_and_all_who_came_hear_it_once(tmp_path, port):
    heard = meet([0, 2], [tmp_path / "run"] * 2, port, world_size=5)
    assert f"of 5 ranks, 1, 3-4 did not come to 127.0.0.1:{port} within 2 s; 0, 2 (" in str(heard[0])
    assert str(heard[2]) == str(heard[0])
    assert (heard[0].is_said_elsewhere, heard[2].is_said_elsewhere) == (False, True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_rank_0_cannot_write_is_heard_by_all(tmp_path, port):
    (tmp_path / "file").touch()
    heard = meet([0, 1], [tmp_path / "file" / "run"] * 2, port)
    assert "file/run cannot be written (Not a directory)" in str(heard[0])
    assert str(heard[1]) == str(heard[0])


def test_ranks_of_different_configurations_are_told(tmp_path, port):
    heard = meet([0, 1], [tmp_path / "run"] * 2, port, options=[(), ("--seed=7",)])
    host = socket.gethostname()
    assert re.search(rf"{host} has config \w+, {host} \w+; all ranks must run the same", str(heard[0]))
    assert str(heard[1]) == str(heard[0])


def test_a_rank_of_another_run_at_the_same_port_is_turned_away(tmp_path, port):
    heard = meet([0, 1], [tmp_path / "one", tmp_path / "other"], port)
    assert f"trains in output_dir {tmp_path}/other, and rank 0 at 127.0.0.1:{port} in {tmp_path}/one" in str(heard[1])
    assert "another --master_port" in str(heard[1])
    assert "of 2 ranks, 1 did not come" in str(heard[0])


@contextmanager
def listens(port):
    """Hold a port, as a program does that never answers."""
    with socket.create_server(("127.0.0.1", port)):
        yield


def test_a_port_that_something_else_has_is_named(tmp_path, port):
    began = time.monotonic()
    with listens(port):
        heard = meet([0, 1], [tmp_path / "run"] * 2, port, seconds=1)
    for thread in [thread for thread in threading.enumerate() if thread.name == "meeting"]:
        thread.join(60)  # it aborts a process that ends before; train.py leaves without taking leave of threads
    assert f"cannot listen at port {port}" in str(heard[0])
    assert f"has not reached rank 0 at 127.0.0.1:{port} within 1 s" in str(heard[1])
    assert time.monotonic() - began < 30, "a client waits for ever where something listens and does not answer"


def test_where_nobody_listens_the_address_is_named(tmp_path, port):
    heard = meet([1], [tmp_path / "run"], port, seconds=1)
    assert f"rank 1 on {socket.gethostname()} has not reached rank 0 at 127.0.0.1:{port}" in str(heard[1])


def attendee(host, *, token="t", **versions):
    return Attendee(hostname=host, versions={**dict.fromkeys(ALIKE, "1"), **versions}, token=token)


def judged(*attendees):
    came = dict(enumerate(attendees))
    return judge(came, a_place(world_size=len(came)), seconds=15, token="t", output_dir="runs/x")


def test_hosts_are_compared_with_that_of_rank_0():
    assert judged(attendee("b"), attendee("b"), attendee("a"), attendee("a")) == []
    assert judged(attendee("b"), attendee("a", torch="2", config="3")) == [
        "a has torch 2, b 1; all ranks must run the same",
        "a has config 3, b 1; all ranks must run the same",
    ]
    assert judged(attendee("b"), attendee("a", token=None), attendee("a", token="other")) == [
        "a: cannot read what b wrote into runs/x; output_dir must be on a disk shared by all hosts"
    ]


def test_only_plain_launches_over_hosts_are_impatient():
    two_hosts = replace(a_place(), local_world_size=1)
    assert usual_seconds(two_hosts, {"RANK": "0"}) == USUAL_SECONDS == 15
    assert usual_seconds(a_place(), {"RANK": "0"}) == PATIENT_SECONDS == 600
    for name in ("DS_DPO_LEASE", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        assert usual_seconds(two_hosts, {name: "1"}) == PATIENT_SECONDS


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([1, 8, 9, 10], "1, 8-10"), ([0, 2, 4, 5], "0, 2, 4-5")])
def test_ranks_are_written_as_spans(ranks, text):
    assert spans(ranks) == text
