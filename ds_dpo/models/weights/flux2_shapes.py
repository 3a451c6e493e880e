"""The parameters of FLUX.2's transformer, from its configuration, without building it.

Source: diffusers, Flux2Transformer2DModel, Flux2TransformerBlock and Flux2SingleTransformerBlock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

DEFAULTS: dict[str, int] = {
    "attention_head_dim": 128,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "patch_size": 1,
    "timestep_guidance_channels": 256,
}
# settings that are read apart, or that change no parameter
OTHERS = {"out_channels", "guidance_embeds", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps"}


def flux2_shapes(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return names and shapes of the parameters, or None if a setting of the configuration is not known here."""
    settings = {**DEFAULTS, "guidance_embeds": True, "mlp_ratio": 3.0, **config}
    settings["out_channels"] = settings.get("out_channels") or settings["in_channels"]
    numbers = [settings[name] for name in (*DEFAULTS, "out_channels")]
    is_known = (
        {name for name in config if not name.startswith("_")} <= DEFAULTS.keys() | OTHERS
        and all(type(number) is int and number > 0 for number in numbers)
        and type(settings["guidance_embeds"]) is bool
        and isinstance(settings["mlp_ratio"], int | float)
    )
    return {name: shape for name, shape in _transformer(settings)} if is_known else None


def _transformer(settings: Mapping[str, Any]) -> Named:
    width, head_width = settings["num_attention_heads"] * settings["attention_head_dim"], settings["attention_head_dim"]
    hidden = int(width * settings["mlp_ratio"])
    for embedder in ("timestep_embedder", *(("guidance_embedder",) if settings["guidance_embeds"] else ())):
        yield f"time_guidance_embed.{embedder}.linear_1.weight", (width, settings["timestep_guidance_channels"])
        yield f"time_guidance_embed.{embedder}.linear_2.weight", (width, width)
    # blocks of a kind share the layer that modulates them
    for name, sets in (("double_stream_modulation_img", 2), ("double_stream_modulation_txt", 2)):
        yield f"{name}.linear.weight", (3 * sets * width, width)
    yield "single_stream_modulation.linear.weight", (3 * width, width)
    yield "x_embedder.weight", (width, settings["in_channels"])
    yield "context_embedder.weight", (width, settings["joint_attention_dim"])
    for number in range(settings["num_layers"]):
        name = f"transformer_blocks.{number}"
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield f"{name}.attn.{layer}.weight", (width, width)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{name}.attn.{norm}.weight", (head_width,)
        for mlp in ("ff", "ff_context"):
            yield f"{name}.{mlp}.linear_in.weight", (2 * hidden, width)
            yield f"{name}.{mlp}.linear_out.weight", (width, hidden)
    for number in range(settings["num_single_layers"]):
        name = f"single_transformer_blocks.{number}.attn"
        yield f"{name}.to_qkv_mlp_proj.weight", (3 * width + 2 * hidden, width)
        for norm in ("norm_q", "norm_k"):
            yield f"{name}.{norm}.weight", (head_width,)
        yield f"{name}.to_out.weight", (width, width + hidden)
    yield "norm_out.linear.weight", (2 * width, width)
    yield "proj_out.weight", (settings["patch_size"] ** 2 * settings["out_channels"], width)
