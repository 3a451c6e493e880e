"""Part 8: a VAE of real size, the attention kernels that are chosen, TF32, and the timeouts of process groups."""

from __future__ import annotations

import os
from typing import Any

import torch
from gpu_check_models import TIMEOUT, join, model_config, random_unet
from gpu_check_report import Report, Setup, peak_gb, timed
from torch.distributed import distributed_c10d

from ds_dpo.distributed.arithmetic import set_arithmetic
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.attention import choose_attention
from ds_dpo.models.vae import decode_latents, encode_images
from ds_dpo.precision import torch_dtype

GROUPS_OF_ONE_RANK = 2  # the default one, and DeepSpeed's clone of it


def check(setup: Setup, report: Report) -> None:
    """Encode two images and decode one in each precision; read settings back from where they act."""
    device = join()
    report.try_to("group_timeouts_seconds", lambda: _timeouts(report, device))
    report.try_to("tf32", lambda: _tf32(report))
    report.try_to("attention", lambda: _attention(setup, device))
    for dtype in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        report.try_to(f"vae_{dtype}", lambda dtype=dtype: _vae(setup, report, device, torch_dtype(dtype)))
    if device.type != "cuda":
        report.skip("vae_fp16", "fp16 needs a GPU")


def _timeouts(report: Report, device: torch.device) -> list[float]:
    """Return the timeout of each process group, as its backend has it."""
    groups = list(distributed_c10d._world.pg_map)
    found = [group._get_backend(device).options._timeout.total_seconds() for group in groups]
    report.require(f"there are {len(found)} groups", len(found) >= GROUPS_OF_ONE_RANK)
    report.require(f"groups wait {found} s, not {TIMEOUT}", set(found) == {TIMEOUT.total_seconds()})
    return found


def _tf32(report: Report) -> dict[str, Any]:
    """Return the flags by default and as the product sets them, and what a product of fp32 loses with each."""
    default = _flags()
    set_arithmetic(allow_tf32=True, deterministic=False, environ=os.environ)
    allowed = _product_error()
    set_arithmetic(allow_tf32=False, deterministic=False, environ=os.environ)
    report.require("TF32 is on", not any(_flags().values()))
    return {"by_default": default, "error_with": allowed, "error_without": _product_error()}


def _flags() -> dict[str, bool]:
    return {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }


def _product_error() -> float:
    """Return the largest error of a product of fp32 matrices against fp64, as a share of the largest value."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    one, other = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = one.double() @ other.double()
    found = (one.to(device) @ other.to(device)).cpu().double()
    return float((found - exact).abs().max() / exact.abs().max())


def _attention(setup: Setup, device: torch.device) -> dict[str, str]:
    unet = random_unet(model_config(setup, "unet"), setup, device=torch.device("meta"))
    found = {}
    for asked in ("auto", "xformers"):
        try:
            found[asked] = choose_attention(unet, asked, device=device, dtype=setup.dtype).sentence
        except ModelError as error:
            found[asked] = str(error)[:300]
    return found


def _vae(setup: Setup, report: Report, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    config = model_config(setup, "vae")
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL.from_config(config).requires_grad_(False).eval()
    vae = vae.to(dtype)
    side, factor = config["sample_size"], 2 ** (len(config["block_out_channels"]) - 1)
    pixels = torch.rand(2, 3, side, side, device=device) * 2 - 1
    noise = torch.randn(2, config["latent_channels"], side // factor, side // factor, device=device)
    latents = encode_images(vae, pixels, noise)
    images = decode_latents(vae, latents[:1])
    report.require(
        f"latents or images in {dtype} are not finite", bool(latents.isfinite().all() and images.isfinite().all())
    )
    encode_peak = peak_gb(lambda: encode_images(vae, pixels, noise))
    decode_peak = peak_gb(lambda: decode_latents(vae, latents[:1]))
    return {
        "latents": list(latents.shape),
        "images": list(images.shape),
        "encode_2_ms": 1000 * timed(lambda: encode_images(vae, pixels, noise)),
        "decode_1_ms": 1000 * timed(lambda: decode_latents(vae, latents[:1])),
        "encode_peak_gb": encode_peak,
        "decode_peak_gb": decode_peak,
    }
