"""The names of a UNet's parameters in single files (A1111, Forge, ComfyUI), from diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ds_dpo.errors import ModelError

UNET_PREFIX = "model.diffusion_model."

# modules outside the blocks: diffusers -> LDM
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# parts of a residual block; attention blocks have the same names in both
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>[a-z]+)\.(?P<layer>\d+)\.(?P<rest>.+)")
MIDDLE = re.compile(r"mid_block\.(?P<kind>[a-z]+)\.(?P<layer>\d+)\.(?P<rest>.+)")


def ldm_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Map each of a diffusers UNet's parameter names to its name in a single file, prefix included; one to one.

    config: the UNet's diffusers configuration. Raises ModelError for a UNet that single files cannot express.
    Source: the module order of CompVis' and Stability AI's openaimodel.py, as diffusers' from_single_file reads it.
    """
    _check_expressible(config)
    layers = _layers_per_block(config)
    found = {name: UNET_PREFIX + _ldm_name(name, layers, config["up_block_types"]) for name in names}
    assert len(set(found.values())) == len(found), "two parameters have one name"
    return found


def _check_expressible(config: Mapping[str, Any]) -> None:
    for field in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if config.get(field) is not None:
            raise ModelError(
                f"--format single-file: {field} {config[field]!r} does not exist in a single file of SD or SDXL"
            )
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise ModelError(
            f"--format single-file: addition_embed_type {config['addition_embed_type']!r}; only none (SD 1.5) "
            "and 'text_time' (SDXL) are possible"
        )


def _layers_per_block(config: Mapping[str, Any]) -> int:
    layers = config["layers_per_block"]
    different = set(layers) if isinstance(layers, list | tuple) else {layers}
    if len(different) > 1:
        raise ModelError(
            f"--format single-file: layers_per_block {layers}; single files have one number for all blocks"
        )
    return int(different.pop())


def _ldm_name(name: str, layers: int, up_block_types: Sequence[str]) -> str:
    if match := BLOCK.fullmatch(name):
        block, layer = int(match["block"]), int(match["layer"])
        has_attention = match["side"] == "up" and "Attn" in up_block_types[block]
        place = PLACES[match["side"], match["kind"]](block, layer, layers, has_attention)
        return f"{place}.{_inner(match['kind'], match['rest'])}"
    if match := MIDDLE.fullmatch(name):
        # resnets and attentions alternate
        place_in_middle = 2 * int(match["layer"]) + (match["kind"] == "attentions")
        return f"middle_block.{place_in_middle}.{_inner(match['kind'], match['rest'])}"
    module, _, parameter = name.rpartition(".")
    if module not in OUTER:
        raise ModelError(f"--format single-file: parameter {name!r} does not exist in a single file of SD or SDXL")
    return f"{OUTER[module]}.{parameter}"


# (block, layer, layers per block, whether the block attends) -> place among all layers; input_blocks.0 is conv_in
PLACES: dict[tuple[str, str], Callable[[int, int, int, bool], str]] = {
    ("down", "resnets"): lambda block, layer, layers, _: f"input_blocks.{1 + block * (layers + 1) + layer}.0",
    ("down", "attentions"): lambda block, layer, layers, _: f"input_blocks.{1 + block * (layers + 1) + layer}.1",
    ("down", "downsamplers"): lambda block, _layer, layers, _: f"input_blocks.{(block + 1) * (layers + 1)}.0",
    ("up", "resnets"): lambda block, layer, layers, _: f"output_blocks.{block * (layers + 1) + layer}.0",
    ("up", "attentions"): lambda block, layer, layers, _: f"output_blocks.{block * (layers + 1) + layer}.1",
    # after the last layer of its block
    ("up", "upsamplers"): lambda block, _, layers, attends: (
        f"output_blocks.{block * (layers + 1) + layers}.{1 + attends}"
    ),
}


def _inner(kind: str, rest: str) -> str:
    if kind == "resnets":
        module, _, parameter = rest.rpartition(".")
        return f"{RESNET[module]}.{parameter}"
    if kind == "downsamplers":
        return rest.replace("conv.", "op.", 1)
    return rest
