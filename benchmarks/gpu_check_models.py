"""A policy with the product's own engine, reference and step around it, with random weights and random pairs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from gpu_check_report import Setup

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.device import pick_device
from ds_dpo.distributed.environment import export_environment, read_environment
from ds_dpo.engine.device import silence_deepspeed, start_communication
from ds_dpo.engine.engine import Engine, build_engine
from ds_dpo.engine.settings import ResolvedDeepSpeed, resolve_deepspeed
from ds_dpo.models.denoiser.attention import AttentionChoice, set_attention
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.reference import Reference
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.reference.residency import RESIDENCIES
from ds_dpo.step.preference_step import PreferenceStep

ASSETS = Path(__file__).resolve().parents[1] / "ds_dpo" / "assets"
TIMEOUT = timedelta(minutes=77)  # no backend's default
SDPA = AttentionChoice(name="sdpa", sentence="")


def join() -> torch.device:
    """Start communication of this process alone, as a run does; returns its device."""
    silence_deepspeed()
    place = read_environment({})
    export_environment(place)
    picked = pick_device(place.local_rank, os.environ)
    start_communication(timeout=TIMEOUT, device=picked.device)
    return picked.device


def model_config(setup: Setup, part: str) -> dict[str, Any]:
    """Return the configuration of SDXL's unet or vae, or of the miniature's."""
    family = ASSETS / "model_configs" / "sdxl" if setup.is_full else ASSETS / "miniature" / "model"
    found: dict[str, Any] = json.loads((family / part / "config.json").read_text(encoding="utf-8"))
    return found


def random_unet(
    config: dict[str, Any], setup: Setup, *, device: torch.device, attention: AttentionChoice = SDPA
) -> Any:
    """Return a UNet with seeded weights, as load_denoiser returns one, made on the device."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(config)
    unet = unet.to(setup.dtype)
    read_row_major(unet)
    set_attention(unet, attention)
    unet.enable_gradient_checkpointing()
    return unet.train()


def random_pairs(config: dict[str, Any], number: int, *, device: torch.device, seed: int = 0) -> PreferenceBatch:
    """Return a micro-batch of pairs for a UNet of this configuration, at its own image size."""
    generator = torch.Generator().manual_seed(seed)
    side, width = config["sample_size"], config["cross_attention_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return PreferenceBatch(
        latents=draw(2 * number, 4, side, side),
        noise=draw(number, 4, side, side),
        timesteps=torch.randint(1000, (number,), generator=generator),
        text_states=draw(number, 77, width),
        pooled=draw(number, pooled),
        extras={"time_ids": torch.tensor([[8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side]] * 2 * number)},
        pair_ids=torch.arange(number),
        target_probabilities=torch.ones(number),
        weights=torch.ones(number),
    ).to(device)


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine and, by residency, a step that compares its policy with a reference there."""

    config: RunConfig
    resolved: ResolvedDeepSpeed
    engine: Engine
    references: dict[str, Reference]
    steps: dict[str, PreferenceStep]


def build(
    unet: Any,
    setup: Setup,
    *,
    device: torch.device,
    stage: int,
    residencies: tuple[str, ...] = ("replicated",),
    accumulation: int = 1,
    options: tuple[str, ...] = (),
) -> Built:
    """Give a policy references and an engine, in the order of a run."""
    file = f"zero{stage}_{'bf16' if setup.is_full else 'fp32_cpu'}"
    given = ["--config", "miniature", "--deepspeed_config", file, "--micro_batch_pairs", "1", *options]
    config = load_config([*given, "--pairs_per_step", str(accumulation), "--reference.residency", "zero3"]).config
    resolved = resolve_deepspeed(config, world_size=1)
    references: dict[str, Reference] = {}
    for name in residencies:
        residency = RESIDENCIES[name]
        assert residency is not None, "a reference with weights"
        references[name] = residency.settle(residency.copy(unet, predict_by_unet, setup.dtype, device), resolved)
    engine = build_engine(
        unet,
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=10_000,
    )
    schedule = training_schedule(config.model, config.diffusion).to(device)
    steps = {
        name: PreferenceStep(
            policy=engine.policy,
            predict=predict_by_unet,
            reference=reference,
            schedule=schedule,
            objective=OBJECTIVES["dpo"],
            options=config.objective.loss_options(),
        )
        for name, reference in references.items()
    }
    return Built(config=config, resolved=resolved, engine=engine, references=references, steps=steps)


def train(built: Built, batch: PreferenceBatch) -> torch.Tensor:
    """Do one micro-batch of the first residency; returns its loss, on the device."""
    step = next(iter(built.steps.values()))
    output = step(batch)
    built.engine.backward_and_step(output.loss)
    return output.loss.detach()
