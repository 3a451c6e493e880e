"""A step of DPO in plain PyTorch: the bare loop of the same model work, and the work list of the authors' train.py.

Source of the list: SalesforceAIResearch/DiffusionDPO, train.py at SDXL: encode pixels and prompts, draw, predict by
policy and reference, backward, clip, AdamW; in mixed precision the policy is fp32 under autocast and the rest is bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEARNING_RATE, CLIP, BETA = 1e-8, 1.0, 5000.0
WARM_UP = 2  # steps that are not measured, as for the product's


def timed_steps(step: Callable[[], None], steps: int) -> list[float]:
    """Return the seconds of each of N steps, after those that warm up."""
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def load_unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)


def dpo_loss(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss; each argument (2 N, 4, X, Y), chosen images first."""
    gaps = []
    for prediction in (policy, reference):
        chosen, rejected = (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3)).chunk(2)
        gaps.append(chosen - rejected)
    return -functional.logsigmoid(-0.5 * BETA * (gaps[0] - gaps[1])).mean()


def bare(folder: Path, *, dtype: str, pairs: int, micro_batches: int, side: int, steps: int) -> list[float]:
    """Return the seconds of steps that do both forward passes, the loss, the backward pass, clipping and fused AdamW.

    Weights are in dtype, with fp32 masters if that is bf16. pairs: of a micro-batch. side: of a latent.
    """
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    policy, reference = load_unet(folder, torch_dtype).train(), load_unet(folder, torch_dtype)
    reference.requires_grad_(False)
    weights = list(policy.parameters())
    masters = weights if dtype == "fp32" else [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    given = random_inputs(policy.config, pairs, side, torch_dtype)
    target = torch.randn(2 * pairs, 4, side, side, dtype=torch_dtype)

    def step() -> None:
        for _ in range(micro_batches):
            prediction = policy(**given).sample
            with torch.no_grad():
                of_reference = reference(**given).sample
            (dpo_loss(prediction, of_reference, target) / micro_batches).backward()
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                if master is not weight:
                    weight.copy_(master)

    return timed_steps(step, steps)


def random_inputs(config: Any, pairs: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what SDXL's UNet is called with, for N pairs; the text's length is the miniature's."""
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    rows = 2 * pairs
    return {
        "sample": torch.randn(rows, 4, side, side, dtype=dtype),
        "timestep": torch.randint(0, 1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, 16, config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, pooled, dtype=dtype),
            "time_ids": torch.full((rows, 6), 64.0),
        },
    }


def authors(
    folder: Path, *, dtype: str, pairs: int, resolution: int, checkpointing: bool, offload: bool, steps: int
) -> list[float]:
    """Return the seconds of steps of the authors' work list, one micro-batch each, on images that are in memory.

    checkpointing, offload: as their train.py switches them on for SDXL; offload is that of accelerate, which brings the
    weights of VAE, text encoders and reference to the device for each call.
    """
    import accelerate
    from diffusers import StableDiffusionXLPipeline

    half = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=half)
    policy, frozen = load_unet(folder, torch.float32).train(), [pipeline.vae, pipeline.text_encoder]
    frozen += [pipeline.text_encoder_2, pipeline.unet]
    for module in frozen:
        module.requires_grad_(False)
        if offload:
            accelerate.cpu_offload(module)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    pixels = torch.randn(2 * pairs, 3, resolution, resolution)
    prompts = ["a red circle on a white background"] * pairs
    alphas = pipeline.scheduler.alphas_cumprod

    @torch.no_grad()
    def prepare() -> tuple[dict[str, Any], Tensor]:
        latents = pipeline.vae.encode(pixels.to(half)).latent_dist.sample() * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, len(alphas), (pairs,)).repeat(2)
        share = alphas[timesteps].to(half)[:, None, None, None]
        states, pooled = encode_prompts(pipeline, prompts)
        time_ids = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=half)
        given = {
            "sample": share.sqrt() * latents + (1 - share).sqrt() * noise,
            "timestep": timesteps,
            "encoder_hidden_states": states.repeat(2, 1, 1),
            "added_cond_kwargs": {"text_embeds": pooled.repeat(2, 1), "time_ids": time_ids.repeat(2 * pairs, 1)},
        }
        return given, noise

    def step() -> None:
        given, noise = prepare()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            prediction = policy(**given).sample
            with torch.no_grad():
                of_reference = pipeline.unet(**given).sample
        loss = dpo_loss(prediction, of_reference, noise)
        loss.item()  # as their log
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return timed_steps(step, steps)


def encode_prompts(pipeline: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return text states (N, L, C) and pooled embeddings (N, P), as SDXL has them."""
    states, pooled = [], None
    parts = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    for tokenizer, encoder in parts:
        length = tokenizer.model_max_length
        ids = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        found = encoder(ids, output_hidden_states=True)
        pooled = found[0]
        states.append(found.hidden_states[-2])
    assert pooled is not None
    return torch.cat(states, -1), pooled
