"""The parameters of FLUX.1's transformer, from its configuration, without building it.

Source: diffusers, FluxTransformer2DModel, FluxTransformerBlock and FluxSingleTransformerBlock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

TIME_WIDTH = 256  # of the sines of a time, and of a scale of guidance
MLP_RATIO = 4
DEFAULTS: dict[str, int] = {
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
# settings that are read apart, or that change no parameter
OTHERS = {"out_channels", "guidance_embeds", "axes_dims_rope"}


def flux1_shapes(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return names and shapes of the parameters, or None if a setting of the configuration is not known here."""
    settings = {**DEFAULTS, "guidance_embeds": False, **config}
    settings["out_channels"] = settings.get("out_channels") or settings["in_channels"]
    numbers = [settings[name] for name in (*DEFAULTS, "out_channels")]
    is_known = (
        {name for name in config if not name.startswith("_")} <= DEFAULTS.keys() | OTHERS
        and all(type(number) is int and number > 0 for number in numbers)
        and type(settings["guidance_embeds"]) is bool
    )
    return dict(_transformer(settings)) if is_known else None


def _transformer(settings: Mapping[str, Any]) -> Named:
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    embedded = {"timestep_embedder": TIME_WIDTH, "text_embedder": settings["pooled_projection_dim"]}
    if settings["guidance_embeds"]:
        embedded["guidance_embedder"] = TIME_WIDTH
    for embedder, own in embedded.items():
        yield from _linear(f"time_text_embed.{embedder}.linear_1", own, width)
        yield from _linear(f"time_text_embed.{embedder}.linear_2", width, width)
    yield from _linear("context_embedder", settings["joint_attention_dim"], width)
    yield from _linear("x_embedder", settings["in_channels"], width)
    for number in range(settings["num_layers"]):
        yield from _double_block(f"transformer_blocks.{number}", width, settings["attention_head_dim"])
    for number in range(settings["num_single_layers"]):
        yield from _single_block(f"single_transformer_blocks.{number}", width, settings["attention_head_dim"])
    yield from _linear("norm_out.linear", width, 2 * width)
    yield from _linear("proj_out", width, settings["patch_size"] ** 2 * settings["out_channels"])


def _double_block(name: str, width: int, head_width: int) -> Named:
    for norm in ("norm1", "norm1_context"):
        yield from _linear(f"{name}.{norm}.linear", width, 6 * width)
    for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield from _linear(f"{name}.attn.{layer}", width, width)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield f"{name}.attn.{norm}.weight", (head_width,)
    for mlp in ("ff", "ff_context"):
        yield from _linear(f"{name}.{mlp}.net.0.proj", width, MLP_RATIO * width)
        yield from _linear(f"{name}.{mlp}.net.2", MLP_RATIO * width, width)


def _single_block(name: str, width: int, head_width: int) -> Named:
    """Yield a block's parameters; attention and MLP are side by side, and one layer reads both."""
    yield from _linear(f"{name}.norm.linear", width, 3 * width)
    for layer in ("to_q", "to_k", "to_v"):
        yield from _linear(f"{name}.attn.{layer}", width, width)
    for norm in ("norm_q", "norm_k"):
        yield f"{name}.attn.{norm}.weight", (head_width,)
    yield from _linear(f"{name}.proj_mlp", width, MLP_RATIO * width)
    yield from _linear(f"{name}.proj_out", (1 + MLP_RATIO) * width, width)


def _linear(name: str, width: int, own: int) -> Named:
    yield f"{name}.weight", (own, width)
    yield f"{name}.bias", (own,)
