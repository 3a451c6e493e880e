"""The miniatures, a row each: one shaped like SDXL, which predicts noise, and one like Stable Diffusion 3, a flow."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from ds_dpo.miniature import flow_models, models


class Text(Protocol):
    """Tokenizers and text encoders: models.TextParts or flow_models.FlowText."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return text states (N, tokens, width) and pooled texts (N, width)."""
        ...

    def encode_for_training(self, prompts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the texts of a step of pre-training."""
        ...

    def trained_modules(self) -> list[nn.Module]:
        """Return the modules that are trained together with the denoiser."""
        ...

    def components(self) -> dict[str, Any]:
        """Return the parts by their names in the pipeline."""
        ...


@dataclass(frozen=True)
class Noised:
    """Latents with noise, the denoiser's time (N,), and what it should predict."""

    noisy: Tensor
    time: Tensor
    target: Tensor


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one miniature is made.

    name: of its folder in assets. denoiser: its name in the pipeline. sampler: draws images from timesteps that
    `predict` takes. scheduler: is saved with the pipeline. pipeline_settings: arguments of the pipeline that are no
    parts. steps, batch, learning_rate, average_decay: of the denoiser's pre-training. rows_per_prompt: of its training
    pairs.
    """

    name: str
    denoiser: str
    make_denoiser: Callable[[], nn.Module]
    noised: Callable[[Tensor, torch.Generator], Noised]
    predict: Callable[[Any, tuple[Tensor, Tensor], Tensor, Tensor], Tensor]
    sampler: Callable[[], Any]
    scheduler: Callable[[], Any]
    text_of: Callable[[Any], Text]
    pipeline_class: type[DiffusionPipeline]
    pipeline_settings: dict[str, Any]
    steps: int
    batch: int
    learning_rate: float
    average_decay: float
    rows_per_prompt: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A miniature's modules, in fp32."""

    kind: Kind
    text: Text
    vae: AutoencoderKL
    denoiser: Any


def load_parts(kind: Kind, folder: Path) -> Parts:
    """Return the parts of a saved pipeline."""
    pipeline: Any = kind.pipeline_class.from_pretrained(folder, dtype=torch.float32)
    return Parts(kind=kind, text=kind.text_of(pipeline), vae=pipeline.vae, denoiser=getattr(pipeline, kind.denoiser))


def save_parts(parts: Parts, folder: Path) -> None:
    """Write the complete pipeline folder, in fp16."""
    kind = parts.kind
    components = parts.text.components() | {"vae": parts.vae, kind.denoiser: parts.denoiser}
    pipeline = kind.pipeline_class(**components, scheduler=kind.scheduler(), **kind.pipeline_settings)
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        # diffusers writes from where a part was loaded, which is a path of this machine
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def sample(parts: Parts, prompts: list[str], *, seed: int) -> Tensor:
    """Return images (N, 3, 32, 32) in 0..1: 20 steps of the first order, guidance 1."""
    scheduler = parts.kind.sampler()
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((len(prompts), models.LATENT_CHANNELS, 8, 8), generator=generator)
    encoded = parts.text.encode(prompts)
    for timestep in scheduler.timesteps:
        prediction = parts.kind.predict(parts.denoiser, encoded, latents, timestep.expand(len(prompts)))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    config = parts.vae.config
    decoded = parts.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return ((decoded + 1) / 2).clamp(0, 1)


def _noised_by_schedule(latents: Tensor, generator: torch.Generator) -> Noised:
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    return Noised(models.make_scheduler().add_noise(latents, noise, timesteps), timesteps, noise)


def _noised_by_flow(latents: Tensor, generator: torch.Generator) -> Noised:
    """Draw logit-normal times; the target is the velocity (arXiv:2403.03206, section 3.1)."""
    noise = torch.randn(latents.shape, generator=generator)
    share = torch.sigmoid(torch.randn(len(latents), generator=generator))
    of_noise = share.view(-1, 1, 1, 1)
    return Noised((1 - of_noise) * latents + of_noise * noise, 1000 * share, noise - latents)


def _predict_by_unet(unet: Any, text: tuple[Tensor, Tensor], noisy: Tensor, time: Tensor) -> Tensor:
    states, pooled = text
    added = {"text_embeds": pooled, "time_ids": models.time_ids(len(noisy))}
    prediction: Tensor = unet(noisy, time, encoder_hidden_states=states, added_cond_kwargs=added).sample
    return prediction


def _predict_by_transformer(transformer: Any, text: tuple[Tensor, Tensor], noisy: Tensor, time: Tensor) -> Tensor:
    states, pooled = text
    prediction: Tensor = transformer(
        noisy, encoder_hidden_states=states, pooled_projections=pooled, timestep=time
    ).sample
    return prediction


def _ddim() -> DDIMScheduler:
    config = models.make_scheduler().config
    return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=False)


SDXL_KIND = Kind(
    name="miniature",
    denoiser="unet",
    make_denoiser=models.make_unet,
    noised=_noised_by_schedule,
    predict=_predict_by_unet,
    sampler=_ddim,
    scheduler=models.make_scheduler,
    text_of=lambda pipeline: models.TextParts(
        pipeline.tokenizer, pipeline.tokenizer_2, pipeline.text_encoder, pipeline.text_encoder_2
    ),
    pipeline_class=StableDiffusionXLPipeline,
    pipeline_settings={"force_zeros_for_empty_prompt": False, "add_watermarker": False},
    steps=9000,
    batch=32,
    learning_rate=1.5e-3,
    average_decay=0.995,
    rows_per_prompt=46,
)
FLOW_KIND = Kind(
    name="miniature_flow",
    denoiser="transformer",
    make_denoiser=flow_models.make_transformer,
    noised=_noised_by_flow,
    predict=_predict_by_transformer,
    sampler=flow_models.make_flow_scheduler,
    scheduler=flow_models.make_flow_scheduler,
    text_of=lambda pipeline: flow_models.FlowText(
        (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3),
        (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3),
    ),
    pipeline_class=StableDiffusion3Pipeline,
    pipeline_settings={},
    steps=20_000,
    batch=24,
    learning_rate=2e-3,
    average_decay=0.998,
    rows_per_prompt=24,
)
