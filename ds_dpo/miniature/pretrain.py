"""Pre-train a miniature's denoiser on the latents of drawings; it resumes from its own state file."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ds_dpo.miniature import flow_models
from ds_dpo.miniature.kinds import FLOW_KIND, SDXL_KIND, Kind, Parts, sample
from ds_dpo.miniature.models import make_text_parts
from ds_dpo.miniature.pretrain_vae import drawing_set, pretrain_vae, share
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.training import REPORT_EVERY, Training
from ds_dpo.miniature.world import BACKGROUNDS, COLOURS, PROMPTS, SHAPES, caption_indices
from ds_dpo.process.say import Say

TEXT_STEPS = 150
DRAWINGS = 20_000
PROMPT_DROPOUT = 0.1
MEASURE_EVERY = 1000


def pretrain(folder: Path, kind: Kind, *, say: Say) -> Parts:
    """Train what a miniature has of its own on drawings; returns its parts with averaged weights."""
    return pretrain_denoiser(folder, STARTS[kind.name](folder, say=say), say=say)


def start_with_own_parts(folder: Path, *, say: Say) -> Parts:
    """Train the VAE; the text encoders learn to tell the captions apart, and are trained on with the UNet."""
    vae = pretrain_vae(folder, say=say)
    torch.manual_seed(4)
    text, unet = make_text_parts(), SDXL_KIND.make_denoiser()
    parts = Parts(kind=SDXL_KIND, text=text, vae=vae, denoiser=unet)
    if not _state_file(folder, SDXL_KIND).exists():
        end = 1 + len(PROMPTS[0].split())  # each word is a token, after the start token

        def pooled_and_end() -> list[Tensor]:
            states, pooled = text.encode(list(PROMPTS))
            return [pooled, states[:, end]]

        say(f"text warm-up: cross-entropy {_warm_up_text(text.trained_modules(), pooled_and_end):.4f}")
    return parts


def start_with_parts_of_the_first(folder: Path, *, say: Say) -> Parts:
    """Take VAE and CLIPs of the first miniature; a T5 of its own learns to tell the captions apart, then is frozen."""
    torch.manual_seed(4)
    tokenizer = flow_models.make_t5_tokenizer()
    encoder = flow_models.make_t5(tokenizer)
    end = len(PROMPTS[0].split())

    def end_states() -> list[Tensor]:
        return [flow_models.t5_states(tokenizer, encoder, list(PROMPTS), flow_models.TEXT_LENGTH)[:, end]]

    say(f"T5 warm-up: cross-entropy {_warm_up_text([encoder], end_states):.4f}")
    tokenizers, encoders = flow_models.load_clip_tokenizers(), flow_models.load_clips()
    text = flow_models.FlowText((*tokenizers, tokenizer), (*encoders, encoder.eval()))
    return Parts(kind=FLOW_KIND, text=text, vae=flow_models.load_vae(), denoiser=FLOW_KIND.make_denoiser())


STARTS = {SDXL_KIND.name: start_with_own_parts, FLOW_KIND.name: start_with_parts_of_the_first}


def pretrain_denoiser(folder: Path, parts: Parts, *, say: Say) -> Parts:
    """Train the denoiser, and the text encoders that are not frozen, on the latents of drawings."""
    kind, file = parts.kind, _state_file(folder, parts.kind)
    modules: list[nn.Module] = [parts.denoiser, *parts.text.trained_modules()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(5)
    training = Training(file, modules, optimizer, generator, average_decay=kind.average_decay)
    training.resume()
    prompts, latents = _latent_set(parts.vae)
    losses: list[float] = []
    clock = time.monotonic()
    while training.step < kind.steps:
        rows = torch.randint(len(latents), (kind.batch,), generator=generator)
        noised = kind.noised(latents[rows], generator)
        dropped = torch.rand(kind.batch, generator=generator) < PROMPT_DROPOUT
        batch = ["" if drop else prompts[row] for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)]
        text = parts.text.encode_for_training(batch, generator)
        loss = F.mse_loss(kind.predict(parts.denoiser, text, noised.noisy, noised.time), noised.target)
        progress = training.step / kind.steps
        rate = kind.learning_rate * min(1.0, (training.step + 1) / 100) * max(0.02, min(1.0, 2 * (1 - progress)))
        training.update(loss, rate)
        losses.append(loss.item())
        if training.step % REPORT_EVERY == 0:
            mean = sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])
            say(f"{kind.denoiser} step {training.step} loss {mean:.4f}  {time.monotonic() - clock:.0f} s")
            training.save()
        if training.step % MEASURE_EVERY == 0:
            restore = training.use_average()
            say(describe_quality(parts))
            restore()
    training.use_average()
    parts.denoiser.eval()
    return parts


def _state_file(folder: Path, kind: Kind) -> Path:
    return folder / f"{kind.denoiser}.pt"


def _warm_up_text(encoders: list[nn.Module], features: Callable[[], list[Tensor]]) -> float:
    """Teach encoders to tell the captions apart, in seconds; a denoiser alone needs thousands of steps for it.

    features: returns what the encoders make of all prompts, (72, width) each. Returns the last loss.
    """
    sizes = (len(COLOURS), len(SHAPES), len(BACKGROUNDS))
    heads = nn.ModuleList(nn.Linear(found.shape[-1], size) for found in features() for size in sizes)
    parameters = [parameter for module in (*encoders, heads) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    targets = caption_indices(PROMPTS)
    for _ in range(TEXT_STEPS):
        inputs = [(found, target) for found in features() for target in targets]
        losses = [F.cross_entropy(head(x), y) for head, (x, y) in zip(heads, inputs, strict=True)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def _latent_set(vae: AutoencoderKL) -> tuple[list[str], Tensor]:
    prompts, images = drawing_set(DRAWINGS, seed=6)
    latents = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(250)]
    return prompts, (torch.cat(latents) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def describe_quality(parts: Parts, *, per_prompt: int = 2) -> str:
    """Return a line on the quality of the base, over all prompts."""
    prompts = [prompt for prompt in PROMPTS for _ in range(per_prompt)]
    was_training = parts.denoiser.training
    parts.denoiser.eval()
    images = torch.cat([sample(parts, prompts[i : i + 72], seed=i) for i in range(0, len(prompts), 72)])
    parts.denoiser.train(was_training)
    found: dict[str, Any] = vars(measure(images, prompts))
    return "quality: " + ", ".join(f"{name} {share(values)}" for name, values in found.items())
