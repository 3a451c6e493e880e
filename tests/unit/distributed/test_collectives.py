"""How two real ranks wait for, follow and agree with one another."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from forked import forks_of_one
from torch import distributed, multiprocessing

from ds_dpo.checkpoints.folder import Retention
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents
from ds_dpo.distributed.collectives import (
    broadcast_object,
    gather_objects,
    is_main,
    sum_across_ranks,
    world_size,
)
from ds_dpo.errors import CheckpointError
from ds_dpo.run_folder.metrics import StepSums
from ds_dpo.storage.manifest import read_manifest
from ds_dpo.storage.state_files import StateFile


def test_alone_everything_works_without_a_process_group() -> None:
    assert (world_size(), is_main(), gather_objects("a"), broadcast_object("b")) == (1, True, ["a"], "b")
    assert sum_across_ranks(torch.tensor([1.0, 2.0])).tolist() == [1, 2]


def test_two_ranks(tmp_path: Path) -> None:
    forks_of_one()
    multiprocessing.start_processes(follow_one_another, args=(tmp_path,), nprocs=2, start_method="forkserver")


def follow_one_another(rank: int, folder: Path) -> None:
    """What each of the two ranks does; an assertion that fails here fails the test with its traceback."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert gather_objects(f"of {rank}") == ["of 0", "of 1"]
    assert broadcast_object(rank) == 0
    assert sum_across_ranks(torch.tensor([1.0, rank])).tolist() == [2, 1]
    means_are_over_the_pairs_of_all_ranks(rank)
    ranks_agree_on_a_checkpoint(rank, folder / "checkpoints")
    distributed.destroy_process_group()


def means_are_over_the_pairs_of_all_ranks(rank: int) -> None:
    sums = StepSums()
    sums.add({"loss": torch.tensor([1.0, 2.0] if rank == 0 else [6.0])})
    means, totals = sums.reduce(counters={"asked": float(rank), "bad_rows": 2.0})
    assert means == {"loss": 3.0}
    assert totals == {"asked": 1.0, "bad_rows": 4.0}


def ranks_agree_on_a_checkpoint(rank: int, folder: Path) -> None:
    full_ranks: set[int] = set()

    def write(step: int, path: Path) -> None:
        if rank in full_ranks:
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.save({"step": step}, path)

    shard = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    engine: Any = SimpleNamespace(
        module=SimpleNamespace(config={}),
        layout_digest=lambda: "layout",
        checkpoint_files=lambda client_state: [StateFile(name=shard, state=client_state["step"], write=write)],
        read_checkpoint=lambda found: torch.load(found / shard),
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
    assert store.load_newest().client_state == {"step": 2}
    gather_objects(None)
    if rank == 1:
        (newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_text("7")
    assert store.load_newest().client_state == {"step": 1}, "the shard of rank 0 is sound, and yet neither takes it"


def raised_by(action: Callable[[], None]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
