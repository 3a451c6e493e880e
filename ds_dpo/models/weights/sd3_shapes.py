"""The parameters of Stable Diffusion 3's transformer, from its configuration, without building it.

Source: diffusers, SD3Transformer2DModel and JointTransformerBlock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

TIME_WIDTH = 256  # of the sines of a timestep
MLP_RATIO = 4
NORMS_OF_ATTENTION = {None: (), "rms_norm": ("weight",)}
DEFAULTS: dict[str, Any] = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1152,
    "dual_attention_layers": (),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 18,
    "num_layers": 18,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "qk_norm": None,
}
# settings that change no parameter
FREE = {"pos_embed_max_size", "sample_size", "_class_name", "_diffusers_version", "_name_or_path"}


def sd3_shapes(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return names and shapes of the parameters, or None if a setting of the configuration is not known here."""
    settings = {**DEFAULTS, **config}
    numbers = [settings[name] for name in DEFAULTS if name not in ("dual_attention_layers", "qk_norm")]
    is_known = (
        config.keys() <= DEFAULTS.keys() | FREE
        and all(type(number) is int and number > 0 for number in numbers)
        and settings["qk_norm"] in NORMS_OF_ATTENTION
    )
    return dict(_transformer(settings)) if is_known else None


def sd3_tables(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return names and shapes of the tables that a file has beside the parameters: the positions of patches."""
    settings = {**DEFAULTS, "pos_embed_max_size": 96, **config}
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    return {"pos_embed.pos_embed": (1, settings["pos_embed_max_size"] ** 2, width)}


def _transformer(settings: Mapping[str, Any]) -> Named:
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    patch = settings["patch_size"]
    yield "pos_embed.proj.weight", (width, settings["in_channels"], patch, patch)
    yield "pos_embed.proj.bias", (width,)
    for embedder, own in (("timestep_embedder", TIME_WIDTH), ("text_embedder", settings["pooled_projection_dim"])):
        yield from _linear(f"time_text_embed.{embedder}.linear_1", own, width)
        yield from _linear(f"time_text_embed.{embedder}.linear_2", width, width)
    yield from _linear("context_embedder", settings["joint_attention_dim"], settings["caption_projection_dim"])
    for number in range(settings["num_layers"]):
        yield from _block(f"transformer_blocks.{number}", width, number, settings)
    yield from _linear("norm_out.linear", width, 2 * width)
    yield from _linear("proj_out", width, patch * patch * settings["out_channels"])


def _block(name: str, width: int, number: int, settings: Mapping[str, Any]) -> Named:
    """Yield a block's parameters; the last one has no text behind it, so it changes the image's tokens alone."""
    is_last = number == settings["num_layers"] - 1
    is_dual = number in settings["dual_attention_layers"]
    norms = NORMS_OF_ATTENTION[settings["qk_norm"]]
    yield from _linear(f"{name}.norm1.linear", width, (9 if is_dual else 6) * width)
    yield from _linear(f"{name}.norm1_context.linear", width, (2 if is_last else 6) * width)
    added = ("add_q_proj", "add_k_proj", "add_v_proj", *(() if is_last else ("to_add_out",)))
    for layer in ("to_q", "to_k", "to_v", "to_out.0", *added):
        yield from _linear(f"{name}.attn.{layer}", width, width)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield from ((f"{name}.attn.{norm}.{part}", (settings["attention_head_dim"],)) for part in norms)
    if is_dual:
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{name}.attn2.{layer}", width, width)
        for norm in ("norm_q", "norm_k"):
            yield from ((f"{name}.attn2.{norm}.{part}", (settings["attention_head_dim"],)) for part in norms)
    for mlp in ("ff", *(() if is_last else ("ff_context",))):
        yield from _linear(f"{name}.{mlp}.net.0.proj", width, MLP_RATIO * width)
        yield from _linear(f"{name}.{mlp}.net.2", MLP_RATIO * width, width)


def _linear(name: str, width: int, own: int) -> Named:
    yield f"{name}.weight", (own, width)
    yield f"{name}.bias", (own,)
