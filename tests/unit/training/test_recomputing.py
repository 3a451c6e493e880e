"""Blocks that recompute are chosen once, for the rank with the least memory, and said in one line."""

from __future__ import annotations

import pytest
import torch

from ds_dpo.config.load import load_config
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.errors import ConfigError
from ds_dpo.models.loading import load_denoiser
from ds_dpo.planning.fit.blocks import Block, BlockTable, Moment
from ds_dpo.training import recomputing
from ds_dpo.training.recomputing import decide_blocks, free_bytes, settle_recomputing

NODE = RankEnvironment(
    rank=0, world_size=16, local_rank=0, local_world_size=8, master_addr="localhost", master_port=29500
)
GB = 10**9
# one block keeps 6 GB and another one 2, both for 10 % more work
TABLE = BlockTable(
    blocks=[
        Block(name="large", kept_bytes=6 * GB, flop=10, inputs=frozenset()),
        Block(name="small", kept_bytes=2 * GB, flop=10, inputs=frozenset()),
    ],
    moments=[Moment(peak_bytes=9 * GB, keeping=frozenset((0, 1)), turn=None, gone=frozenset())],
    input_bytes=[],
    flop=100,
)


@pytest.mark.parametrize(
    ("asked", "room", "names", "line"),
    [
        ("auto", 9.5 * GB, [], "0 of 2 blocks compute their activations again (0% more work); activations take up to "
         "9 GB of 9.5 GB that are free for them"),
        ("auto", 7.5 * GB, ["large"], "1 of 2 blocks compute their activations again (10% more work); activations "
         "take up to 3 GB of 7.5 GB that are free for them"),
        ("auto", -1.0, ["large", "small"], "2 of 2 blocks compute their activations again (20% more work); "
         "activations take up to 1 GB, and only 0 GB are free for them: if memory runs out, take a smaller "
         "batch.micro_batch_pairs"),
        ("auto", None, ["large", "small"], "2 of 2 blocks compute their activations again (20% more work); "
         "activations take up to 1 GB; free memory is not known here"),
        (1, None, ["large"], "1 of 2 blocks compute their activations again (10% more work); activations take up to "
         "3 GB"),
    ],
)  # fmt: skip
def test_a_decision_and_its_line(asked: int | str, room: float | None, names: list[str], line: str) -> None:
    decision = decide_blocks(TABLE, asked, room=room)
    assert (decision.names, decision.line) == (names, f"gradient checkpointing: {line}")


def test_more_blocks_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"gradient_checkpointing 3: the denoiser has 2 blocks .* up to 2, or all"):
        decide_blocks(TABLE, 3, room=None)


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "available_bytes", lambda: 64 * GB)
    assert free_bytes(torch.device("cpu"), NODE) == 8 * GB
    monkeypatch.setattr(recomputing, "available_bytes", lambda: None)
    assert free_bytes(torch.device("cpu"), NODE) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GB)
    assert free_bytes(torch.device("cuda", 0), NODE) == 52 * GB


def test_the_rank_with_the_least_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature in fp32 takes 16 bytes a parameter for gradient, master weight and moments at ZeRO-2."""
    options = ["--deepspeed_config", "zero2_fp32_cpu", "--gradient_checkpointing", "auto"]
    config = load_config(["--config", "miniature", *options]).config
    resolved = resolve_deepspeed(config, world_size=1)
    policy = load_denoiser(config.model, dtype=torch.float32)
    states = 16 * policy.num_parameters()
    alone = RankEnvironment(
        rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="localhost", master_port=29500
    )

    def line(own: float, other: float | None) -> str:
        monkeypatch.setattr(recomputing, "available_bytes", lambda: int((own + states) / 0.94) + 1)
        monkeypatch.setattr(recomputing, "gather_objects", lambda room: [room, room if other is None else other])
        return settle_recomputing(policy, config, resolved, alone, device=torch.device("cpu"))[0]

    assert "0 of 11 blocks" in line(1e9, None)
    assert not policy.is_gradient_checkpointing
    assert "of 1 GB that are free for them" in line(1e9, None)
    small = line(1e9, 20e6)
    assert "of 0.02 GB that are free for them" in small
    assert policy.is_gradient_checkpointing
