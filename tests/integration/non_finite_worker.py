"""Give engines of every ZeRO stage and precision steps that are not finite on one rank, and say what these changed.

Usage: python non_finite_worker.py OUT. Leaves OUT/CASE_RANK.json: "changed" has the names of what each of these steps
changed, "counts" the skipped steps after each, "updates" those of the average, "differs" the names of what a later step
made other than in an engine that never met them, "moved" how much that step changed. Comparisons are to the bit.
"""

import itertools
import json
from pathlib import Path

import torch
from torch import nn
from zero_layouts_worker import launch

RANKS, ACCUMULATION = 2, 2
OPTIONS = {
    1: {},
    2: {"overlap_comm": False},
    3: {"overlap_comm": True, "stage3_param_persistence_threshold": 0, "sub_group_size": 30},
}
CASES = {
    f"{stage}_{precision}": (stage, precision, {}) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")
}
CASES["1_bf16_bf16"] = (1, "bf16", {"data_types": {"grad_accum_dtype": "bf16"}})  # another optimizer of DeepSpeed's
KINDS = {
    "nan_loss": lambda loss: loss * float("nan"),
    "inf_loss_of_finite_gradient": lambda loss: loss + float("inf"),
    "nan_gradient": lambda loss: Spoiled.apply(loss, float("nan")),
    "inf_gradient": lambda loss: Spoiled.apply(loss, float("inf")),
}
BAD_STEPS = list(itertools.product(KINDS, range(RANKS), range(ACCUMULATION)))


class Spoiled(torch.autograd.Function):
    """A loss whose gradient is multiplied by something."""

    @staticmethod
    def forward(context, loss, factor):
        context.factor = factor
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


def settings(stage: int, precision: str, top: dict) -> dict:
    switches: dict = {} if precision == "fp32" else {precision: {"enabled": True}}
    if precision == "fp16":  # at its least, where DeepSpeed by itself would end the run at the first overflow
        switches["fp16"] |= {"initial_scale_power": 6, "hysteresis": 1, "min_loss_scale": 64}
    return {
        "train_batch_size": 2 * RANKS * ACCUMULATION,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **OPTIONS[stage]},
        "data_types": {"grad_accum_dtype": "fp32"},
        **switches,
        **top,
    }


def build(stage: int, precision: str, top: dict):
    from ds_dpo.config.optimization import OptimizerConfig, ScheduleConfig
    from ds_dpo.engine.engine import build_engine
    from ds_dpo.precision import torch_dtype

    torch.manual_seed(0)
    # even sizes: ZeRO-3 leaves the padding of odd ones as it finds the memory
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(torch_dtype(precision))
    engine = build_engine(
        module,
        settings=settings(stage, precision, top),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(name="linear", decay_steps=100),
        max_train_steps=100,
    )
    engine.keep_average(decay=0.5)
    return engine


def take_step(engine, number: int, rank: int, *, bad=(None, None, None)) -> None:
    kind, bad_rank, bad_micro = bad
    for micro in range(ACCUMULATION):
        torch.manual_seed(100 * number + 10 * rank + micro)
        x = torch.randn(2, 4).to(engine._raw.module[0].weight.dtype)
        loss = engine.policy(x).float().square().mean()
        if (rank, micro) == (bad_rank, bad_micro):
            loss = KINDS[kind](loss)
        engine.backward_and_step(loss)


def state_of(engine) -> dict[str, torch.Tensor]:
    """All that an update changes, on this rank, by name."""
    optimizer = engine._raw.optimizer
    found = {f"master {number}": group for number, group in enumerate(engine.flat_master_groups())}
    for number, state in enumerate(optimizer.optimizer.state.values()):
        found |= {f"{name} {number}": value for name, value in state.items()}
    found |= {f"average {number}": group for number, group in enumerate(engine._averages["ema"].groups)}
    found |= {
        f"weight {name}": getattr(weight, "ds_tensor", weight) for name, weight in engine.module.named_parameters()
    }
    found["learning rate"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    found["schedule"] = torch.tensor(engine._raw.lr_scheduler.last_epoch)
    found["loss scale"] = torch.tensor(engine.loss_scale or 1.0)
    return {name: torch.as_tensor(value).detach().clone() for name, value in found.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def examine(case: str, rank: int) -> dict:
    engine, untouched = build(*CASES[case]), build(*CASES[case])
    for each in (engine, untouched):
        take_step(each, 0, rank)
    before = state_of(engine)
    changed, counts = {}, []
    for bad in BAD_STEPS:
        take_step(engine, 1, rank, bad=bad)
        after = state_of(engine)
        changed[" ".join(map(str, bad))], before = differing(before, after), after
        counts.append(engine.skipped_steps)
    for each in (engine, untouched):
        take_step(each, 2, rank)
    moved = differing(before, state_of(engine))
    return {
        "changed": changed,
        "counts": counts,
        "updates": engine._averages["ema"]._updates,
        "differs": differing(state_of(engine), state_of(untouched)),
        "moved": len(moved),
        "finite": all(bool(torch.isfinite(value).all()) for value in state_of(engine).values()),
    }


def all_cases(rank: int, out: Path) -> None:
    for case in CASES:
        (out / f"{case}_{rank}.json").write_text(json.dumps(examine(case, rank)))


if __name__ == "__main__":
    launch(all_cases)
