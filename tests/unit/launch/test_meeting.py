"""Ranks that meet: who is missing, who differs, who sees another folder, and whose port it is."""

import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from repository import ROOT
from torch.distributed import DistError

from ds_dpo.config.load import load_config
from ds_dpo.distributed.device import PickedDevice
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import ConfigError, LaunchError, LostRankError, StopAskedError
from ds_dpo.launch.meeting import (
    DEVICE_ALIKE,
    PATIENT_SECONDS,
    USUAL_SECONDS,
    Attendee,
    _attend,
    _open_store,
    _Table,
    judge,
    meeting,
    spans,
    usual_seconds,
)
from ds_dpo.launch.report import ALIKE
from ds_dpo.supervision.stop import StopRequest

SECONDS = 2.0
ON_CPU = {"DS_ACCELERATOR": "cpu"}


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


def a_stop(folder):
    return StopRequest(folder / "STOP", leave_at_once=lambda number: None)


def meet(ranks, output_dirs, port, *, world_size=2, options=(), seconds=SECONDS, stop=None):
    """Let these ranks meet, each on a thread; return by rank what each of them heard: an error, or None.

    stop: the request of the last of these ranks.
    """
    heard = {}
    everyone = threading.Barrier(len(ranks))

    def attend(rank, output_dir, further):
        arguments = [f"--output_dir={output_dir}", f"--supervision.meeting_seconds={seconds}", *further]
        config = load_config(["--config=miniature", *arguments]).config
        try:
            own_stop = stop if stop is not None and rank == ranks[-1] else a_stop(output_dir)
            place = a_place(rank, world_size=world_size, port=port)
            with meeting(config, place, ON_CPU, stop=own_stop, say=lambda line: None):
                everyone.wait(60)  # rank 0 holds what they met through
            heard[rank] = None
        except (LaunchError, StopAskedError) as error:
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
    lines = []
    config = load_config([f"--output_dir={tmp_path}"]).config
    with meeting(config, a_place(world_size=1), ON_CPU, stop=a_stop(tmp_path), say=lines.append):
        pass
    assert lines == []


@pytest.mark.parametrize("ranks", [[0, 2], [2, 0]], ids=["rank 2 is asked", "rank 0 is asked"])
def test_a_request_to_one_rank_ends_the_meeting_of_all_who_came(tmp_path, port, ranks):
    stop = a_stop(tmp_path)
    stop.ask()
    began = time.monotonic()
    heard = meet(ranks, [tmp_path / "run"] * 2, port, world_size=3, seconds=300, stop=stop)
    assert time.monotonic() - began < 100, "rank 1 never comes, and would be waited for 300 s"
    assert {rank: type(error) for rank, error in heard.items()} == {0: StopAskedError, 2: StopAskedError}
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_asked_does_not_wait_long_for_a_rank_0_that_never_comes(tmp_path, port, monkeypatch):
    monkeypatch.setattr("ds_dpo.launch.meeting.ASKED_SECONDS", 0.2)
    stop = a_stop(tmp_path)
    stop.ask()
    heard = meet([1], [tmp_path / "run"], port, seconds=1, stop=stop)
    assert str(heard[1]) == "stopped as asked before training began; the same command starts at the same step"


def test_a_rank_0_that_is_killed_is_no_refusal(tmp_path, port, monkeypatch):
    """So that the launch ends with the status of a failure, after which a job may be started again."""
    monkeypatch.setattr(_Table, "wait", lambda *names, seconds: (_ for _ in ()).throw(DistError("reset by peer")))
    table = _Table(None, a_place(1), seconds=1, attempt="0", is_asked=lambda: False)
    with pytest.raises(LostRankError, match=r"rank 0 at 127.0.0.1:29500 has exited \(reset by peer\)") as caught:
        _attend(table, tmp_path, {})
    assert caught.value.exit_status == 1


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


def attendee(host, *, token="t", problem=None, gpu_id=None, **versions):
    versions = {**dict.fromkeys((*ALIKE, *DEVICE_ALIKE), "1"), **versions}
    return Attendee(hostname=host, versions=versions, token=token, device_problem=problem, gpu_id=gpu_id)


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


def test_devices_are_compared_before_ranks_communicate():
    """NCCL on one host and gloo on the other would wait for each other for an hour."""
    assert judged(attendee("b", gpu_id="x"), attendee("a", gpu_id="x"), attendee("a", gpu_id="y")) == []
    assert judged(attendee("b", accelerator="cuda"), attendee("a", accelerator="cpu"), attendee("a", nccl="2")) == [
        "a has accelerator cpu, b cuda; all ranks must run the same",
        "a has accelerator 1, b cuda; all ranks must run the same",
        "a has nccl 2, b 1; all ranks must run the same",
    ]
    lost = {"problem": "no GPU works here", "accelerator": "none", "nccl": "none"}
    assert judged(attendee("b"), attendee("b"), attendee("a", **lost), attendee("a", **lost)) == [
        "a (ranks 2-3): no GPU works here"
    ]
    assert judged(attendee("b", gpu_id="x"), attendee("b", gpu_id="x")) == [
        "b: ranks 0-1 have the same GPU (x), but each rank needs one of its own"
    ]


def test_a_rank_without_a_device_is_named_at_once(tmp_path, port, monkeypatch):
    """All ranks come, so that none waits for the one whose host lost its GPU."""
    monkeypatch.setattr("ds_dpo.launch.meeting.pick_device", lost_gpu_of_rank_1)
    heard = meet([0, 1], [tmp_path / "run"] * 2, port, seconds=60)
    assert f"{socket.gethostname()} (ranks 1): no GPU works here" in str(heard[0])
    assert str(heard[1]) == str(heard[0])


def lost_gpu_of_rank_1(local_rank, environ):
    if local_rank == 1:
        raise ConfigError("no GPU works here")
    return PickedDevice(device=torch.device("cuda", local_rank), num_gpus=1, words="cuda", nccl="2.28.9")


def test_one_rank_alone_without_a_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config(["--config=miniature", f"--output_dir={tmp_path}"]).config
    alone = meeting(config, a_place(world_size=1), {}, stop=a_stop(tmp_path), say=lambda line: None)
    with pytest.raises(ConfigError, match="no GPU works here"), alone:
        pass


def test_only_plain_launches_over_hosts_are_impatient():
    two_hosts = replace(a_place(), local_world_size=1)
    assert usual_seconds(two_hosts, {"RANK": "0"}) == USUAL_SECONDS == 15
    assert usual_seconds(a_place(), {"RANK": "0"}) == PATIENT_SECONDS == 600
    for name in ("DS_DPO_LEASE", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        assert usual_seconds(two_hosts, {name: "1"}) == PATIENT_SECONDS


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([1, 8, 9, 10], "1, 8-10"), ([0, 2, 4, 5], "0, 2, 4-5")])
def test_ranks_are_written_as_spans(ranks, text):
    assert spans(ranks) == text


def test_the_meeting_port_is_open_to_the_network_as_the_page_says(port):
    """torch's store listens on all addresses, whichever one ranks are given."""
    store = _open_store(a_place(port=port), seconds=SECONDS, is_agents=False, is_asked=lambda: False)
    with socket.create_connection(("127.0.0.2", port), timeout=SECONDS):
        pass
    del store
    page = " ".join((ROOT / "docs" / "clusters.md").read_text(encoding="utf-8").split())
    assert "listens on all addresses of the first host, without a password or encryption" in page
