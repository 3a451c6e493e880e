"""Pre-train the miniature's VAE and UNet on drawings; each resumes from its own state file."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ds_dpo.miniature.models import TextParts, make_scheduler, make_text_parts, make_unet, make_vae, time_ids
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.world import BACKGROUNDS, COLOURS, PROMPTS, SHAPES, caption_indices, draw
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replacing

POSTERIOR_DEVIATION = 0.05  # of a latent before scaling; the decoder is trained for it
VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 4000, 16, 4e-3
UNET_STEPS, UNET_BATCH, UNET_LEARNING_RATE = 9000, 32, 1.5e-3
TEXT_STEPS = 150
DRAWINGS = 20_000
RIGHT_COLOUR_SHARE = 0.5
PROMPT_DROPOUT = 0.1
EMA_DECAY = 0.995
REPORT_EVERY, MEASURE_EVERY = 200, 1500


class Training:
    """Modules, optimizer, EMA and random state of one pre-training run, in one file."""

    def __init__(
        self, file: Path, modules: list[nn.Module], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ):
        self.file, self.modules, self.optimizer, self.generator = file, modules, optimizer, generator
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step = 0

    def resume(self) -> None:
        if not self.file.exists():
            return
        state = torch.load(self.file, weights_only=True)
        self.step, self.average = state["step"], state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for module, saved in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(saved)

    def save(self) -> None:
        state = {
            "step": self.step,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "modules": [module.state_dict() for module in self.modules],
        }
        with replacing(self.file, sync=False) as temporary:
            torch.save(state, temporary)

    def update(self, loss: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 9))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    def use_average(self) -> Callable[[], None]:
        """Put the averaged weights into the modules; returns a function that restores the trained ones."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        _copy_into(self.parameters, self.average)
        return lambda: _copy_into(self.parameters, trained)


@torch.no_grad()
def _copy_into(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def drawing_set(count: int, *, seed: int) -> tuple[list[str], Tensor]:
    """Return random prompts and their drawings (count, 3, 32, 32) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [PROMPTS[index] for index in torch.randint(len(PROMPTS), (count,), generator=generator).tolist()]
    return prompts, draw(prompts, generator=generator, right_colour_share=RIGHT_COLOUR_SHARE)


def pretrain_vae(folder: Path, *, say: Say) -> AutoencoderKL:
    """Train the VAE on drawings; its scaling factor makes latents of unit variance."""
    torch.manual_seed(0)
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    training = Training(folder / "vae.pt", [vae], optimizer, torch.Generator().manual_seed(1))
    training.resume()
    images = drawing_set(4000, seed=2)[1] * 2 - 1
    clock = time.monotonic()
    while training.step < VAE_STEPS:
        rate = VAE_LEARNING_RATE * min(1.0, (training.step + 1) / 50) * max(0.02, 1 - training.step / VAE_STEPS)
        batch = images[torch.randint(len(images), (VAE_BATCH,), generator=training.generator)]
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=training.generator)
        decoded = vae.decode(posterior.mean + POSTERIOR_DEVIATION * noise).sample
        reconstruction = F.mse_loss(decoded, batch) + 0.3 * F.l1_loss(decoded, batch)
        prior = 1e-4 * posterior.mean.square().mean() + 1e-6 * posterior.kl().mean() / batch.shape[-1] ** 2
        training.update(reconstruction + prior, rate)
        if training.step % REPORT_EVERY == 0:
            say(f"vae step {training.step} loss {reconstruction.item():.4f}  {time.monotonic() - clock:.0f} s")
        if training.step % 1000 == 0:
            training.save()
    _fix_posterior(vae)
    prompts, fresh = drawing_set(256, seed=3)
    with torch.no_grad():
        latents = vae.eval().encode(fresh * 2 - 1).latent_dist.mean
        decoded = (vae.decode(latents).sample + 1) / 2
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    before, after = measure(fresh, prompts), measure(decoded, prompts)
    correlation = torch.corrcoef(torch.stack([before.reward, after.reward]))[0, 1]
    say(f"vae: shape kept {_share(before.shape == after.shape)}, reward correlation {correlation:.4f}")
    return vae


@torch.no_grad()
def _fix_posterior(vae: AutoencoderKL) -> None:
    """Set the posterior to the width that the decoder was trained for: no loss has trained its log-variance."""
    log_variance = slice(vae.config.latent_channels, None)
    vae.quant_conv.weight[log_variance] = 0
    vae.quant_conv.bias[log_variance] = 2 * math.log(POSTERIOR_DEVIATION)


def pretrain_unet(folder: Path, vae: AutoencoderKL, *, say: Say) -> tuple[TextParts, UNet2DConditionModel]:
    """Train UNet and text encoders together on the latents of drawings; returns their averaged weights."""
    torch.manual_seed(4)
    text, unet = make_text_parts(), make_unet()
    modules: list[nn.Module] = [unet, *text.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(5)
    if not (folder / "unet.pt").exists():
        say(f"text warm-up: cross-entropy {_warm_up_text(text):.4f}")
    training = Training(folder / "unet.pt", modules, optimizer, generator)
    training.resume()
    prompts, latents = _latent_set(vae)
    schedule = make_scheduler()
    losses: list[float] = []
    clock = time.monotonic()
    while training.step < UNET_STEPS:
        rows = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        noise = torch.randn((UNET_BATCH, *latents.shape[1:]), generator=generator)
        timesteps = torch.randint(1000, (UNET_BATCH,), generator=generator)
        dropped = torch.rand(UNET_BATCH, generator=generator) < PROMPT_DROPOUT
        batch = ["" if drop else prompts[row] for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)]
        noisy = schedule.add_noise(latents[rows], noise, timesteps)
        loss = F.mse_loss(_predict(unet, text.encode(batch), noisy, timesteps), noise)
        progress = training.step / UNET_STEPS
        rate = UNET_LEARNING_RATE * min(1.0, (training.step + 1) / 100) * max(0.02, min(1.0, 2 * (1 - progress)))
        training.update(loss, rate)
        losses.append(loss.item())
        if training.step % REPORT_EVERY == 0:
            mean = sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])
            say(f"unet step {training.step} loss {mean:.4f}  {time.monotonic() - clock:.0f} s")
            training.save()
        if training.step % MEASURE_EVERY == 0:
            restore = training.use_average()
            say(describe_quality(text, unet, vae))
            restore()
    training.use_average()
    return text, unet.eval()


def _predict(unet: UNet2DConditionModel, text: tuple[Tensor, Tensor], noisy: Tensor, timesteps: Tensor) -> Tensor:
    states, pooled = text
    added = {"text_embeds": pooled, "time_ids": time_ids(len(noisy))}
    return unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample


@torch.no_grad()
def _latent_set(vae: AutoencoderKL) -> tuple[list[str], Tensor]:
    prompts, images = drawing_set(DRAWINGS, seed=6)
    latents = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(250)]
    return prompts, torch.cat(latents) * vae.config.scaling_factor


def _warm_up_text(text: TextParts) -> float:
    """Teach both encoders to distinguish the captions, in seconds; the UNet alone needs thousands of steps for it."""
    states, pooled = text.encode(list(PROMPTS))
    sizes = (len(COLOURS), len(SHAPES), len(BACKGROUNDS))
    state_heads = nn.ModuleList(nn.Linear(states.shape[-1], size) for size in sizes)
    pooled_heads = nn.ModuleList(nn.Linear(pooled.shape[-1], size) for size in sizes)
    trained = [*text.modules(), state_heads, pooled_heads]
    optimizer = torch.optim.AdamW([p for module in trained for p in module.parameters()], lr=3e-3)
    targets = caption_indices(PROMPTS)
    end = 1 + len(PROMPTS[0].split())  # each word is a token, after the start token
    for _ in range(TEXT_STEPS):
        states, pooled = text.encode(list(PROMPTS))
        heads = [(head, pooled) for head in pooled_heads] + [(head, states[:, end]) for head in state_heads]
        loss = sum(
            (F.cross_entropy(head(x), y) for (head, x), y in zip(heads, targets * 2, strict=True)), torch.zeros(())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def sample(text: TextParts, unet: UNet2DConditionModel, vae: AutoencoderKL, prompts: list[str], *, seed: int) -> Tensor:
    """Return images (N, 3, 32, 32) in 0..1: 20 DDIM steps, guidance 1."""
    scheduler = DDIMScheduler.from_config(make_scheduler().config, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((len(prompts), unet.config.in_channels, 8, 8), generator=generator)
    encoded = text.encode(prompts)
    for timestep in scheduler.timesteps:
        prediction = _predict(unet, encoded, latents, timestep.expand(len(prompts)))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return ((vae.decode(latents / vae.config.scaling_factor).sample + 1) / 2).clamp(0, 1)


def describe_quality(text: TextParts, unet: UNet2DConditionModel, vae: AutoencoderKL, *, per_prompt: int = 2) -> str:
    """Return a line on the quality of the base, over all prompts."""
    prompts = [prompt for prompt in PROMPTS for _ in range(per_prompt)]
    was_training = unet.training
    images = torch.cat(
        [sample(text, unet.eval(), vae, prompts[i : i + 72], seed=i) for i in range(0, len(prompts), 72)]
    )
    unet.train(was_training)
    found: dict[str, Any] = vars(measure(images, prompts))
    return "quality: " + ", ".join(f"{name} {_share(values)}" for name, values in found.items())


def _share(values: Tensor) -> str:
    return f"{values.float().mean().item():.3f}"
