"""What an engine waits for: nothing of the device in a step, and for other ranks as long as is configured."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from itertools import repeat
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from small_step import ElementwiseUNet, random_pairs, step_of
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from ds_dpo.config.load import load_config
from ds_dpo.distributed.collectives import leave
from ds_dpo.engine.device import start_communication
from ds_dpo.engine.engine import Engine, build_engine
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.training.micro_batches import MicroBatches
from ds_dpo.training.optimizer_step import OptimizerStep
from ds_dpo.training.run_parts import RunParts

CPU = torch.device("cpu")
WIDTH = 8
NUM_ELEMENTS = WIDTH * WIDTH + WIDTH  # of Linear


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """This process as the only rank of a group, with a timeout that is no backend's default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    start_communication(timeout=timedelta(minutes=77), device=CPU)
    yield
    leave()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def an_engine(file: str, *, accumulation: int = 4, module: torch.nn.Module | None = None) -> Engine:
    options = ["--config", "miniature", "--deepspeed_config", file, "--micro_batch_pairs", "1"]
    config = load_config([*options, "--pairs_per_step", str(accumulation)]).config
    resolved = resolve_deepspeed(config, world_size=1)
    dtype = torch.float32 if resolved.precision == "fp32" else torch.bfloat16
    return build_engine(
        module or torch.nn.Linear(WIDTH, WIDTH).to(dtype),
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=10,
    )


def steps(engine: Engine, *, number: int, accumulation: int = 4) -> None:
    dtype = next(engine.module.parameters()).dtype
    for _ in range(number * accumulation):
        engine.backward_and_step(engine.policy(torch.ones(1, WIDTH, dtype=dtype)).float().square().mean())


def test_every_process_group_has_the_configured_timeout() -> None:
    """DeepSpeed's groups come without one: NCCL would end ranks after 10 minutes."""
    an_engine("zero2_bf16")
    an_engine("zero3_bf16")
    timeouts = [group._get_backend(CPU).options._timeout for group in distributed_c10d._world.pg_map]
    assert len(timeouts) >= 2, "the default group and DeepSpeed's clone of it"
    assert set(timeouts) == {timedelta(minutes=77)}


@pytest.mark.parametrize("file", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_no_step_waits_for_the_device_to_be_timed(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    engine = an_engine(file)
    steps(engine, number=1)
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: calls.append(1))
    steps(engine, number=4)  # DeepSpeed's throughput timer begins with the third step
    assert engine._raw.global_steps == 5
    assert len(calls) == 0


@pytest.mark.parametrize("file", ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload"])
def test_the_update_is_fused_at_every_stage_and_when_offloaded(file: str) -> None:
    assert [group["fused"] for group in an_engine(file)._raw.optimizer.param_groups] == [True]


REDUCTIONS = {  # where DeepSpeed calls a collective of gradients, and what it moves
    "all_reduce": ("torch.distributed", "all_reduce"),
    "reduce": ("torch.distributed", "reduce"),
    "reduce_scatter": ("deepspeed.runtime.comm.coalesced_collectives", "_torch_reduce_scatter_fn"),
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("file", "kind", "is_once_a_step"),
    [("zero1_bf16", "all_reduce", True), ("zero2_bf16", "reduce", False), ("zero3_bf16", "reduce_scatter", False)],
)
def test_gradients_are_reduced_once_a_step_at_stage_1_and_in_each_micro_batch_above(
    file: str, kind: str, is_once_a_step: bool, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = an_engine(file, accumulation=accumulation)
    steps(engine, number=1, accumulation=accumulation)
    sent: list[tuple[str, int]] = []

    def counting(name: str, original: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            given = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
            largest = max(given, key=lambda tensor: tensor.numel())
            if largest.numel() >= NUM_ELEMENTS - WIDTH:  # not a norm or a flag
                sent.append((name, largest.nbytes))
            return original(*arguments, **options)

        return counted

    for name, (module, attribute) in REDUCTIONS.items():
        found = importlib.import_module(module)
        monkeypatch.setattr(found, attribute, counting(name, getattr(found, attribute)))
    steps(engine, number=1, accumulation=accumulation)
    times = 1 if is_once_a_step else accumulation
    assert {name for name, _ in sent} == {kind}
    assert sum(size for _, size in sent) == times * NUM_ELEMENTS * 4, "fp32"


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: numbers read from tensors, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.number = 0
        for name in ("tolist", "numpy", "cpu"):  # these call no operation on a CPU
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, original: Any) -> Any:
        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.number += 1
            return original(tensor, *arguments, **options)

        return counted

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += operation.__name__.partition(".")[0] in self.NAMES
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("file", "of_the_update"),
    # DeepSpeed's own: whether the norm is finite (stage 3); whether to clip, too (1); twice that and an overflow (2)
    [("zero1_bf16", 2), ("zero2_bf16", 3), ("zero3_bf16", 1)],
)
def test_a_micro_batch_reads_nothing_from_the_device_and_a_step_a_few_numbers(
    file: str, of_the_update: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    policy, reference = (ElementwiseUNet(seed=0, dtype=dtype).to(dtype) for _ in range(2))
    engine = an_engine(file, accumulation=accumulation, module=policy)
    objective = OBJECTIVES["dpo"]
    step = OptimizerStep(
        engine=engine,
        preference_step=step_of(objective, {"beta": 500.0}, policy=engine.policy, reference=reference),
        micro_batches=MicroBatches(samples=repeat(random_pairs(2)), encode=lambda batch: batch, bad_rows=list),
        accumulation_steps=accumulation,
    )
    parts = RunParts([])
    for _ in range(3):  # stage 3 notes the order of modules in its first passes
        step.run(parts, counters=lambda: {"asked": 0.0}, beat=lambda: None)
    with HostReads(monkeypatch) as reads:
        numbers: list[int] = []
        step.run(parts, counters=lambda: {"asked": 0.0}, beat=lambda: numbers.append(reads.number))
    assert numbers == [0] * (accumulation - 1) + [of_the_update]
    # the metrics of the step in one read, and the norm for the log
    assert reads.number - of_the_update == 2
