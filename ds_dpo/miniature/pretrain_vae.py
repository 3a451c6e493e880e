"""Pre-train the miniature's VAE on drawings."""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ds_dpo.miniature.models import make_vae
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.training import REPORT_EVERY, Training
from ds_dpo.miniature.world import PROMPTS, draw
from ds_dpo.process.say import Say

POSTERIOR_DEVIATION = 0.05  # of a latent before scaling; the decoder is trained for it
VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 4000, 16, 4e-3
RIGHT_COLOUR_SHARE = 0.5


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
    say(f"vae: shape kept {share(before.shape == after.shape)}, reward correlation {correlation:.4f}")
    return vae


@torch.no_grad()
def _fix_posterior(vae: AutoencoderKL) -> None:
    """Set the posterior to the width that the decoder was trained for: no loss has trained its log-variance."""
    log_variance = slice(vae.config.latent_channels, None)
    vae.quant_conv.weight[log_variance] = 0
    vae.quant_conv.bias[log_variance] = 2 * math.log(POSTERIOR_DEVIATION)


def share(values: Tensor) -> str:
    """Return the mean of N values as text, with three digits."""
    return f"{values.float().mean().item():.3f}"
