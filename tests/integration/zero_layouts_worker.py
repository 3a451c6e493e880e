"""Train a tiny odd-sized module with many DeepSpeed engines on two ranks; leave checkpoints and what they must hold.

Usage: python zero_layouts_worker.py OUT. For each case of CASES: OUT/CASE/global_step2/ (DeepSpeed's files) and
OUT/CASE.pt with {"fp32": .., "exp_avg": .., "exp_avg_sq": .., "module": ..}: full tensors, gathered in the live engine.
For each case of UNIVERSAL also OUT/CASE/global_step2_universal/, made by DeepSpeed's own converter.
"""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

WORLD_SIZE = 2
QUANTITIES = ("fp32", "exp_avg", "exp_avg_sq")
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
# several sub-groups: on a rank the parameters have 18, 4, 17 and 6 elements
SMALL_SUB_GROUPS = {"sub_group_size": 20, "stage3_param_persistence_threshold": 0}
CASES: dict[str, dict] = {
    "zero0_fp32": {"stage": 0, "precision": "fp32"},
    "zero0_bf16": {"stage": 0, "precision": "bf16"},
    "zero1_fp32": {"stage": 1, "precision": "fp32"},
    "zero1_bf16": {"stage": 1, "precision": "bf16"},
    "zero1_bf16_fp32_accumulation": {"stage": 1, "precision": "bf16", "top": FP32_ACCUMULATION},
    "zero2_fp32_two_groups": {"stage": 2, "precision": "fp32", "num_groups": 2},
    "zero2_bf16_round_robin": {"stage": 2, "precision": "bf16", "zero": {"round_robin_gradients": True}},
    "zero2_bf16_aligned": {"stage": 2, "precision": "bf16", "zero": {"parameter_alignment": True}},
    "zero2_fp16": {"stage": 2, "precision": "fp16"},
    "zero3_fp32": {"stage": 3, "precision": "fp32", "zero": {"stage3_param_persistence_threshold": 0}},
    "zero3_fp32_two_groups": {"stage": 3, "precision": "fp32", "num_groups": 2, "zero": SMALL_SUB_GROUPS},
    "zero3_bf16_sub_groups": {"stage": 3, "precision": "bf16", "top": FP32_ACCUMULATION, "zero": SMALL_SUB_GROUPS},
    "zero3_fp16": {"stage": 3, "precision": "fp16", "zero": SMALL_SUB_GROUPS},
    "zero0_bf16_fused": {"stage": 0, "precision": "bf16", "optimizer": "fused", "num_groups": 2},
    "zero0_fp16_fused": {"stage": 0, "precision": "fp16", "optimizer": "fused"},
    "zero2_autocast": {"stage": 2, "precision": "fp32", "top": AUTOCAST},
    "zero3_autocast": {"stage": 3, "precision": "fp32", "top": AUTOCAST, "zero": SMALL_SUB_GROUPS},
    "zero1_tied": {"stage": 1, "precision": "fp32", "model": "tied"},
    "zero3_tied": {"stage": 3, "precision": "fp32", "model": "tied", "zero": SMALL_SUB_GROUPS},
    "zero1_lora": {"stage": 1, "precision": "bf16", "model": "lora"},
    "zero2_lora": {"stage": 2, "precision": "bf16", "model": "lora"},
    "zero3_lora": {"stage": 3, "precision": "bf16", "model": "lora", "zero": SMALL_SUB_GROUPS},
}
UNIVERSAL = ("zero1_bf16", "zero2_fp32_two_groups", "zero3_fp32_two_groups", "zero3_lora")


class Odd(nn.Module):
    """Sizes that no power of two divides; the middle layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.last = nn.Linear(3, 11)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.first(x).relu()) * self.scale.to(x.dtype))


class Tied(Odd):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(5, 7)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.again(x)[:, :5])


def lora() -> nn.Module:
    """Only adapters are trained, under the names that peft gives them."""
    from peft import LoraConfig, get_peft_model

    # from other than zeros, for every weight to move
    return get_peft_model(Odd(), LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False))


MODELS: dict[str, Callable[[], nn.Module]] = {"odd": Odd, "tied": Tied, "lora": lora}


class Fused(torch.optim.AdamW):
    """What the engine is told to take for DeepSpeed's FusedAdam, which a CPU would compile for minutes."""


OPTIMIZERS = {"adamw": torch.optim.AdamW, "fused": Fused}


def deepspeed_settings(*, stage: int, precision: str, top: dict, zero: dict) -> dict:
    switches = {} if precision == "fp32" else {precision: {"enabled": True}}
    if precision == "fp16":
        switches["fp16"]["initial_scale_power"] = 4
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        **switches,
        **top,
    }


def train_and_save(case: str, out: Path, rank: int) -> None:
    import deepspeed

    defaults: dict = {"num_groups": 1, "top": {}, "zero": {}, "model": "odd", "optimizer": "adamw"}
    description = {**defaults, **copy.deepcopy(CASES[case])}
    torch.manual_seed(0)
    model = MODELS[description.pop("model")]()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [trainable] if description.pop("num_groups") == 1 else [trainable[::2], trainable[1::2]]
    optimizer = OPTIMIZERS[description.pop("optimizer")](
        [{"params": group, "weight_decay": 0.0} for group in groups], lr=1e-2
    )
    settings = deepspeed_settings(**description)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(2):
        torch.manual_seed(step * WORLD_SIZE + rank)
        x = torch.randn(2, 5).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    engine.save_checkpoint(str(out / case), tag="global_step2")
    if engine.zero_optimization_stage() > 0:
        save_averages(engine, out / case / "global_step2", rank)
    expected = gather(engine)
    if rank == 0:
        torch.save(expected, out / f"{case}.pt")


def averaged(master: torch.Tensor) -> torch.Tensor:
    """What stands in for a moving average of a weight."""
    return master * 0.5 + 1


def save_averages(engine, folder: Path, rank: int) -> None:
    """Save averages as this project does, from the groups that the engine itself saved."""
    (shard,) = folder.glob(f"*zero_pp_rank_{rank}_*optim_states.pt")
    saved = torch.load(shard, weights_only=False)["optimizer_state_dict"]
    masters = saved.get("fp32_flat_groups", saved.get("single_partition_of_fp32_groups"))
    groups = [averaged(master.detach().float()) for master in masters]
    state = {"format": 1, "decay": 0.5, "updates": 2, "flat_groups": groups}
    torch.save(state, folder / f"ema_rank_{rank:05d}.pt")


def convert_to_universal(folder: Path) -> None:
    """Call what `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state` calls."""
    import argparse

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder),
            output_folder=f"{folder}_universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def gather(engine) -> dict[str, dict[str, torch.Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # DeepSpeed links the moments of the first group only under ZeRO 1 and 2, so its accessor fails for a second one
    is_linked = engine.zero_optimization_stage() == 3 or len(engine.optimizer.param_groups) == 1
    moments = QUANTITIES[1:] if is_linked else ()
    found: dict[str, dict[str, torch.Tensor]] = {quantity: {} for quantity in (*QUANTITIES, "module")}
    found["shared"] = engine._get_shared_params()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found["module"][name] = parameter.detach().clone()
        if engine.zero_optimization_stage() == 0:
            stage_0(engine, name, parameter, found)
        elif parameter.requires_grad and not engine.zero_round_robin_gradients():
            # with round robin DeepSpeed 0.19.8 looks into the slices of the order before shuffling
            found["fp32"][name] = safe_get_full_fp32_param(parameter).clone()
            for quantity in moments:
                found[quantity][name] = safe_get_full_optimizer_state(parameter, quantity).clone()
    return found


def stage_0(engine, name: str, parameter: nn.Parameter, found: dict) -> None:
    """DeepSpeed's accessors know no stage 0: take the master from the optimizer itself."""
    if not parameter.requires_grad:
        return
    master = parameter
    for low, high in zip(getattr(engine.optimizer, "fp16_groups", []), stage_0_masters(engine.optimizer), strict=True):
        for low_parameter, high_parameter in zip(low, high, strict=True):
            if low_parameter is parameter:
                master = high_parameter
    found["fp32"][name] = master.detach().clone()


def stage_0_masters(optimizer) -> list[list[torch.Tensor]]:
    if hasattr(optimizer, "fp32_groups_flat"):
        return [
            [part.view_as(low) for part, low in zip(flat.split([low.numel() for low in group]), group, strict=True)]
            for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        ]
    return getattr(optimizer, "fp32_groups", [])


def run_rank(rank: int, work: Callable[..., None], out: Path, *arguments: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # else it compiles its collectives for CPUs first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # the CPU computes in fp16 well enough for the file layout
    type(get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed.runtime.engine.FusedAdam = Fused
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    work(rank, out, *arguments)
    torch.distributed.barrier()
    os._exit(0)  # the threads of many discarded engines abort an orderly end


def launch(work: Callable[..., None]) -> None:
    """Call work(rank, OUT, *ARGUMENTS) on every rank, OUT and ARGUMENTS from the command line."""
    out, *arguments = sys.argv[1:]
    given = (work, Path(out).resolve(), *arguments)
    # forks: what is imported here is imported once
    torch.multiprocessing.start_processes(run_rank, args=given, nprocs=WORLD_SIZE, start_method="fork")


def all_cases(rank: int, out: Path) -> None:
    for case in CASES:
        train_and_save(case, out, rank)
    if rank == 0:
        for case in UNIVERSAL:
            convert_to_universal(out / case / "global_step2")


if __name__ == "__main__":
    launch(all_cases)
