"""Who a process is under each launcher, and how two real ranks follow one another."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from ds_dpo.checkpoints.folder import Retention, RunIdentity
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents
from ds_dpo.distributed.collectives import (
    RankEnvironment,
    broadcast_object,
    export_environment,
    gather_objects,
    is_main,
    node_turns,
    raise_together,
    read_environment,
    sum_across_ranks,
    world_size,
)
from ds_dpo.errors import CheckpointError, ConfigError, DataError
from ds_dpo.run_folder.metrics import StepSums
from ds_dpo.storage.manifest import read_manifest
from ds_dpo.storage.state_files import StateFile

DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
}
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "node0,node1",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TENTH_OF_16 = RankEnvironment(
    rank=9, world_size=16, local_rank=1, local_world_size=8, master_addr="node0", master_port=29501
)


def test_deepspeed_and_torchrun_say_the_same_in_their_own_words() -> None:
    assert read_environment(DEEPSPEED) == TENTH_OF_16
    assert read_environment(TORCHRUN) == TENTH_OF_16
    assert read_environment({**SRUN, **TORCHRUN}) == TENTH_OF_16, "torchrun inside of a SLURM job"


def test_srun_alone_is_enough() -> None:
    found = read_environment(SRUN)
    assert found == read_environment({**SRUN, "SLURM_PROCID": "9"})
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (9, 16, 1, 8)
    assert (found.master_addr, found.master_port) == ("node0", 20000 + 41234 % 20000)
    given = read_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert (given.master_addr, given.master_port) == ("10.0.0.1", 5000)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [("4", 0, 4), ("8,4", 0, 8), ("8,4", 1, 4), ("8(x2),4", 1, 8), ("8(x2),4", 2, 4), ("1(x128)", 127, 1)],
)
def test_nodes_may_hold_unequal_numbers_of_tasks(tasks: str, node: int, expected: int) -> None:
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    assert read_environment(environ).local_world_size == expected


def test_a_short_list_of_hosts_is_read_by_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**SRUN, "SLURM_STEP_NODELIST": "gpu[07-08]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST='gpu\[07-08\]'.*set MASTER_ADDR"):
        read_environment(environ)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && echo gpu07 && echo gpu08\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert read_environment(environ).master_addr == "gpu07"


def test_without_a_launcher_it_is_the_only_rank() -> None:
    found = read_environment({"PATH": "/bin", "SLURM_JOB_ID": "1"})  # a batch script outside of srun is one process
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (0, 1, 0, 1)
    assert found.master_addr == "127.0.0.1"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE, LOCAL_RANK; start with"),
        ({"WORLD_SIZE": "2"}, "not RANK, LOCAL_RANK; start with"),
        ({**TORCHRUN, "RANK": "first"}, "RANK='first'; a whole number"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8x2"}, r"SLURM_STEP_TASKS_PER_NODE='8x2'.*8\(x2\),4 would fit"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_environment(environ)


def test_what_is_exported_reads_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", exported)
    export_environment(TENTH_OF_16)
    assert read_environment(exported) == TENTH_OF_16


def test_alone_everything_works_without_a_process_group() -> None:
    assert (world_size(), is_main(), gather_objects("a"), broadcast_object("b")) == (1, True, ["a"], "b")
    assert sum_across_ranks(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    raise_together(None)
    with pytest.raises(DataError, match="x"):
        raise_together(DataError("x"))


def test_two_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(follow_one_another, args=(tmp_path,), nprocs=2)
    assert (tmp_path / "turns").read_text().split() == ["in0", "out0", "in1", "out1"]
    assert (tmp_path / "failing_turns").read_text().split() == ["in0"], "rank 1 never enters"


def follow_one_another(rank: int, folder: Path) -> None:
    """What each of the two ranks does; an assertion that fails here fails the test with its traceback."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert gather_objects(f"of {rank}") == ["of 0", "of 1"]
    assert broadcast_object(rank) == 0
    assert sum_across_ranks(torch.tensor([1.0, rank])).tolist() == [2, 1]
    means_are_over_the_pairs_of_all_ranks(rank)
    a_failure_of_one_is_raised_by_all(rank)
    ranks_of_a_node_take_turns(rank, folder)
    ranks_agree_on_a_checkpoint(rank, folder / "checkpoints")
    distributed.destroy_process_group()


def means_are_over_the_pairs_of_all_ranks(rank: int) -> None:
    sums = StepSums()
    sums.add({"loss": torch.tensor([1.0, 2.0] if rank == 0 else [6.0])})
    means, totals = sums.reduce(counters={"asked": float(rank), "bad_rows": 2.0})
    assert means == {"loss": 3.0}
    assert totals == {"asked": 1.0, "bad_rows": 4.0}


def a_failure_of_one_is_raised_by_all(rank: int) -> None:
    raise_together(None)
    error = raised_by(lambda: raise_together(CheckpointError("disk of rank 1 is full") if rank == 1 else None))
    assert type(error) is CheckpointError
    assert str(error) == "disk of rank 1 is full"
    # with both failing, each has its own to tell
    assert str(raised_by(lambda: raise_together(DataError(f"of {rank}")))) == f"of {rank}"

    class Foreign(Exception):
        """Of another library; cannot be sent to another process."""

    error = raised_by(lambda: raise_together(Foreign("broken") if rank == 0 else None))
    assert type(error) is (Foreign if rank == 0 else RuntimeError)
    assert str(error) == ("broken" if rank == 0 else "Foreign: broken")


def ranks_of_a_node_take_turns(rank: int, folder: Path) -> None:
    place = RankEnvironment(
        rank=rank, world_size=2, local_rank=rank, local_world_size=2, master_addr="127.0.0.1", master_port=1
    )

    def take_turn(name: str, failing: int | None) -> None:
        with node_turns(place), (folder / name).open("a") as file:
            file.write(f"in{rank} ")
            if rank == failing:
                raise DataError("no such dataset")
            file.write(f"out{rank} ")

    take_turn("turns", None)
    assert str(raised_by(lambda: take_turn("failing_turns", 0))) == "no such dataset"


def ranks_agree_on_a_checkpoint(rank: int, folder: Path) -> None:
    full_ranks: set[int] = set()

    def write(step: int, path: Path) -> None:
        if rank in full_ranks:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(str(step))

    shard = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    engine: Any = SimpleNamespace(
        module=SimpleNamespace(config={}),
        layout_digest=lambda: "layout",
        checkpoint_files=lambda client_state: [StateFile(name=shard, state=client_state["step"], write=write)],
        read_checkpoint=lambda found: int((found / shard).read_text()),
    )
    identity = RunIdentity(world_size=2, stage=2, precision="fp32", fingerprint="f")
    writer = CheckpointWriter(
        folder, engine=engine, identity=identity, retention=Retention(newest=2), say=lambda line: None
    )
    store = CheckpointStore(folder, engine=engine, identity=identity, say=lambda line: None)

    def save(step: int, *, in_background: bool = False) -> Path:
        writer.begin(step=step, contents=Contents(client_state={"step": step}), in_background=in_background)
        return writer.finish().folder

    save(1, in_background=True)
    newest = save(2)
    assert len(read_manifest(newest).files) == 3, "both shards and the UNet's configuration"
    full_ranks.add(1)
    for in_background in (False, True):
        error = raised_by(lambda: save(3, in_background=in_background))  # noqa: B023 (called at once)
        assert type(error) is CheckpointError, "of rank 0, too"
        assert "by rank 1 on " in str(error)
        assert "No space left" in str(error)
        gather_objects(None)  # until rank 0 has cleared up
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    assert store.load_newest().client_state == 2
    gather_objects(None)
    if rank == 1:
        (newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_text("7")
    assert store.load_newest().client_state == 1, "the shard of rank 0 is sound, and yet neither takes it"


def raised_by(action: Callable[[], None]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
