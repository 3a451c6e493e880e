"""Build the engine of a run for each ZeRO stage on two ranks and say what its master weights and module hold.

Usage: python engine_worker.py OUT. Leaves OUT/STAGE_PRECISION.pt with {"master": .., "module": ..}, whole tensors.
"""

from pathlib import Path

import torch
from zero_layouts_worker import launch

CASES = [(1, "bf16"), (2, "bf16"), (3, "bf16"), (2, "fp16"), (3, "fp16")]


def build_and_gather(rank: int, out: Path, stage: int, precision: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from ds_dpo.config.load import load_config
    from ds_dpo.engine.engine import build_engine
    from ds_dpo.engine.settings import resolve_deepspeed
    from ds_dpo.models.loading import file_weights, load_denoiser
    from ds_dpo.precision import torch_dtype
    from ds_dpo.training.streamed import can_stream, stream_models

    settings = f"zero{stage}_{precision}"
    config = load_config(["--config", "miniature", "--deepspeed_config", settings]).config
    resolved = resolve_deepspeed(config, world_size=2)
    # nothing is small enough to stay whole
    if stage == 3:
        resolved.settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    dtype = torch_dtype(precision)
    if can_stream(config, resolved):
        asked = {"earlier": None, "with_reference": False, "with_start": False}
        policy = stream_models(config, resolved, device=torch.device("cpu"), **asked).policy
    else:
        policy = load_denoiser(config.model, dtype=dtype)
    engine = build_engine(
        policy,
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=1,
    )
    engine.set_master_weights(file_weights(config.model))
    found: dict[str, dict[str, torch.Tensor]] = {"master": {}, "module": {}}
    for name, parameter in engine.module.named_parameters():
        found["master"][name] = safe_get_full_fp32_param(parameter).clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            found["module"][name] = parameter.detach().clone()
    if rank == 0:
        torch.save(found, out / f"{stage}_{precision}.pt")


def all_cases(rank: int, out: Path) -> None:
    for stage, precision in CASES:
        build_and_gather(rank, out, stage, precision)


if __name__ == "__main__":
    launch(all_cases)
