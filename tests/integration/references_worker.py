"""Hold a reference shared by two ranks beside a policy of each ZeRO stage, and say how its predictions compare.

Usage: python references_worker.py OUT. Leaves OUT/RANK.json, by "STAGE_PRECISION" what test_reference_residencies.py
looks at, and the run folders OUT/whole_NAME and OUT/resumed_NAME of trainings whose reference follows the policy.
"""

import json
from pathlib import Path

import torch
from zero_layouts_worker import launch

from ds_dpo.precision import torch_dtype

CASES = [(1, "bf16"), (2, "fp32_cpu"), (2, "bf16"), (3, "fp32_cpu"), (3, "bf16")]
REFRESHED = [(1, "bf16"), (2, "fp32_cpu"), (3, "bf16")]
MOVING = [(2, "fp32_cpu", "replicated"), (2, "fp32_cpu", "zero3"), (2, "fp32_cpu", "cpu"), (3, "bf16", "zero3")]
MOVING_RESUMED = [MOVING[0], MOVING[-1]]


def inputs_of(rank: int, dtype: torch.dtype):
    from ds_dpo.batch import Conditioning

    generator = torch.Generator().manual_seed(rank)
    conditioning = Conditioning(
        text_states=torch.randn(2, 16, 96, generator=generator),
        pooled=torch.randn(2, 48, generator=generator),
        extras={"time_ids": torch.full((2, 6), 32.0)},
    )
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5, 700]), conditioning


def compare(rank: int, stage: int, precision: str) -> dict[str, object]:
    from ds_dpo.config.load import load_config
    from ds_dpo.engine.engine import build_engine
    from ds_dpo.engine.settings import resolve_deepspeed
    from ds_dpo.errors import ReferenceChangedError
    from ds_dpo.models.denoiser.predict import predict_by_unet
    from ds_dpo.models.loading import load_denoiser
    from ds_dpo.models.reference import FrozenCopy
    from ds_dpo.reference.residency import RESIDENCIES, ReferenceWatch
    from ds_dpo.step.first_difference import Side, first_difference

    arguments = ["--config", "miniature", "--deepspeed_config", f"zero{stage}_{precision}"]
    config = load_config([*arguments, "--reference.residency", "zero3"]).config
    resolved = resolve_deepspeed(config, world_size=2)
    # nothing is small enough to stay whole, neither of the policy nor of the reference
    resolved.settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    dtype, device = torch_dtype(resolved.precision), torch.device("cpu")
    unet = load_denoiser(config.model, dtype=dtype)
    plain = FrozenCopy(unet, predict=predict_by_unet, dtype=dtype, device=device)
    residency = RESIDENCIES["zero3"]
    shared = residency.settle(residency.copy(unet, predict_by_unet, dtype, device), resolved)
    engine = build_engine(
        unet,
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=4,
    )
    watch = ReferenceWatch(shared, policy=engine.module)
    inputs = inputs_of(rank, dtype)

    def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.float() - other.float()).abs().max())

    @torch.no_grad()
    def sides_differ() -> str | None:
        policy = Side(module=engine.policy, predict=lambda: predict_by_unet(engine.policy, *inputs))
        return first_difference(policy, Side(module=shared.module, predict=lambda: shared.predict(*inputs)))

    before = shared.predict(*inputs)
    at_rest = list(shared.module.parameters())
    found: dict[str, object] = {
        "whole_elements": sum(parameter.numel() for parameter in at_rest),
        "own_elements": sum(parameter.ds_tensor.numel() for parameter in at_rest),
        "all_elements": sum(parameter.numel() for parameter in plain.module.parameters()),
        "requires_grad": any(parameter.requires_grad for parameter in at_rest) or before.requires_grad,
        "to_plain": largest_difference(before, plain.predict(*inputs)),
        "to_policy": largest_difference(before, predict_by_unet(engine.policy, *inputs)),
    }
    found["first_difference"] = [sides_differ(), None]
    if rank == 1:
        next(shared.module.parameters()).ds_tensor.view(torch.uint8)[1] ^= 1
    found["first_difference"][1] = sides_differ()
    if rank == 1:
        next(shared.module.parameters()).ds_tensor.view(torch.uint8)[1] ^= 1
    # as a step does: the policy's forward pass, the reference's, then the policy's backward pass
    for _ in range(2):
        prediction = predict_by_unet(engine.policy, *inputs)
        shared.predict(*inputs)
        engine.backward_and_step(prediction.float().square().mean())
    found |= {
        "to_plain_after_training": largest_difference(shared.predict(*inputs), plain.predict(*inputs)),
        "to_policy_after_training": largest_difference(
            shared.predict(*inputs), predict_by_unet(engine.policy, *inputs)
        ),
    }
    watch.require_unchanged()
    if rank == 1:
        last = next(shared.module.parameters()).ds_tensor.view(torch.uint8)
        last[0] ^= 1
    try:
        watch.require_unchanged()
    except ReferenceChangedError as error:
        found["error"] = str(error)
    return found


def compare_adapter(rank: int, stage: int, precision: str) -> dict[str, object]:
    """Train a policy's adapter, recomputing activations, and let the policy without it be the reference."""
    from ds_dpo.config.load import load_config
    from ds_dpo.config.optimization import AdapterConfig
    from ds_dpo.engine.engine import build_engine
    from ds_dpo.engine.settings import resolve_deepspeed
    from ds_dpo.models.denoiser.adapters import add_adapter
    from ds_dpo.models.denoiser.predict import predict_by_unet
    from ds_dpo.models.loading import load_denoiser
    from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter
    from ds_dpo.reference.residency import ReferenceWatch
    from ds_dpo.step.first_difference import Side, first_difference

    # a rate at which two updates show in a prediction in bf16, on any processor
    options = ["--deepspeed_config", f"zero{stage}_{precision}", "--learning_rate", "1e-2"]
    config = load_config(["--config", "miniature", *options]).config
    resolved = resolve_deepspeed(config, world_size=2)
    if stage == 3:
        resolved.settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    dtype = torch_dtype(resolved.precision)
    unet = load_denoiser(config.model, dtype=dtype)
    plain, reference = (
        FrozenCopy(unet, predict=predict_by_unet, dtype=dtype, device="cpu"),
        PolicyWithoutAdapter(unet, predict=predict_by_unet),
    )
    add_adapter(unet, AdapterConfig(type="lora", rank=2, dropout=0.5), seed=0)
    unet.enable_gradient_checkpointing()
    engine = build_engine(
        unet,
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=4,
        saves_frozen_weights=False,
    )
    watch = ReferenceWatch(reference, policy=engine.module)
    inputs = inputs_of(rank, dtype)

    @torch.no_grad()
    def sides_differ() -> str | None:
        policy = Side(module=engine.policy, predict=lambda: predict_by_unet(engine.policy, *inputs))
        return first_difference(policy, Side(module=reference.module, predict=lambda: reference.predict(*inputs)))

    first_differences = [sides_differ()]
    to_plain, to_policy = [], []
    for _ in range(3):
        without = reference.predict(*inputs)
        prediction = predict_by_unet(engine.policy, *inputs)
        engine.backward_and_step(prediction.float().square().mean())
        to_plain.append(float((without.float() - plain.predict(*inputs).float()).abs().max()))
        to_policy.append(float((without.float() - prediction.detach().float()).abs().max()))
    first_differences.append(sides_differ())
    watch.require_unchanged()
    trains = all(part.training for part in unet.modules())
    return {"to_plain": to_plain, "to_policy": to_policy, "trains": trains, "first_difference": first_differences}


def train_in_two_ways(
    out: Path, name: str, stage: int, precision: str, *, resumes: bool = True, **options: object
) -> None:
    """Train 5 steps, at once and, if it resumes, with a stop after step 3."""
    from ds_dpo import train

    settings = {
        "config": "miniature",
        "deepspeed_config": f"zero{stage}_{precision}",
        "pairs_per_step": 4,
        "micro_batch_pairs": 1,
        "schedule.warmup_steps": 0,
        "schedule.decay_steps": 20,
        "cadence.sample_every_steps": "none",
        **options,
    }
    for kind, ends in (("whole", [5]), ("resumed", [3, 5]))[: 1 + resumes]:
        folder = out / f"{kind}_{name}"
        for steps in ends:
            run = {**settings, "output_dir": str(folder), "max_train_steps": steps}
            train.main([f"--{option}={value}" for option, value in run.items()])


def all_cases(rank: int, out: Path) -> None:
    found = {f"{stage}_{precision}": compare(rank, stage, precision) for stage, precision in CASES}
    adapters = {f"{stage}_{precision}": compare_adapter(rank, stage, precision) for stage, precision in CASES}
    (out / f"{rank}.json").write_text(json.dumps({"shared": found, "adapter": adapters}))
    for stage, precision in REFRESHED:
        # refreshed after steps 2 and 4
        options: dict[str, object] = {"reference.refresh_every_steps": 2}
        train_in_two_ways(out, f"{stage}_{precision}", stage, precision, **options)
    for stage, precision, residency in MOVING:
        options = {
            "reference.ema_decay": 0.5,
            "reference.residency": residency,
            "cadence.save_every_steps": 1,
            "cadence.keep_checkpoints": 5,
        }
        resumes = (stage, precision, residency) in MOVING_RESUMED
        train_in_two_ways(out, f"{stage}_{precision}_{residency}", stage, precision, resumes=resumes, **options)


if __name__ == "__main__":
    launch(all_cases)
