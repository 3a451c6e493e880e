"""Derive configurations of diffusers and transformers from the shapes of a single file's tensors.

What the shapes do not show, such as the width of an attention head, comes from the family's configuration. Names are
those in the file, without the prefix of their part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ds_dpo.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

_TRANSFORMER = re.compile(r"((?:input|output)_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\..+")


# ---- the UNet ----


@dataclass(frozen=True)
class _Block:
    """A block of one resolution. depths: number of transformer layers in each of its layers, 0 without attention."""

    width: int
    depths: tuple[int, ...]

    @property
    def attends(self) -> bool:
        return any(self.depths)

    def common_depth(self) -> int | list[int]:
        """Return one number if all layers agree, else a list; 1 for a block without attention."""
        if not self.attends:
            return 1
        return self.depths[0] if len(set(self.depths)) == 1 else list(self.depths)


def derived_unet_config(shapes: Shapes, family: Config) -> Config:
    """Return the configuration of a UNet: widths, layers, transformer depths, conditioning.

    family: the configuration of its family's usual UNet. Raises ModelError if the tensors are not those of a UNet
    that diffusers could build.
    """
    try:
        down, up, middle = _blocks(shapes)
        depths = _transformer_depths(down, up, middle)
        attention = next(name for name in shapes if name.endswith(".attn2.to_k.weight"))
        projection = next(shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight"))
        conditioning = shapes.get("label_emb.0.0.weight")
        widths = [block.width for block in down]
        return {
            **family,
            **depths,
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "out_channels": shapes["out.2.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": len(down[0].depths),
            "down_block_types": ["CrossAttnDownBlock2D" if block.attends else "DownBlock2D" for block in down],
            "up_block_types": ["CrossAttnUpBlock2D" if block.attends else "UpBlock2D" for block in up],
            "mid_block_type": "UNetMidBlock2D" if middle is None else "UNetMidBlock2DCrossAttn",
            "attention_head_dim": _heads(widths, family),
            "cross_attention_dim": shapes[attention][1],
            "use_linear_projection": len(projection) == 2,
            **({} if conditioning is None else {"projection_class_embeddings_input_dim": conditioning[1]}),
        }
    except (KeyError, StopIteration, IndexError) as error:
        raise ModelError(f"its UNet's tensors are not those of SD or SDXL ({error})") from error


def _blocks(shapes: Shapes) -> tuple[list[_Block], list[_Block], int | None]:
    """Return downward blocks, upward blocks from the coarsest on, and the middle's depth, None if it is one resnet."""
    depths: dict[str, int] = {}
    for match in filter(None, map(_TRANSFORMER.fullmatch, shapes)):
        depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    down, layers = [], []
    for place in range(1, _how_many(shapes, "input_blocks.{}.0.")):
        name = f"input_blocks.{place}"
        if f"{name}.0.op.weight" not in shapes:
            layers.append((shapes[f"{name}.0.out_layers.3.weight"][0], depths.get(name, 0)))
            continue
        down.append(layers)
        layers = []
    down.append(layers)
    num_up = _how_many(shapes, "output_blocks.{}.0.")
    per_block = len(down[0])
    if {len(block) for block in down} != {per_block} or num_up != len(down) * (per_block + 1):
        raise ModelError(
            "its UNet's blocks have different numbers of layers; give a diffusers folder, which can state them"
        )
    up_depths = [depths.get(f"output_blocks.{place}", 0) for place in range(num_up)]
    downward = [_Block(block[0][0], tuple(depth for _, depth in block)) for block in down]
    upward = [
        _Block(block.width, tuple(up_depths[place * (per_block + 1) : (place + 1) * (per_block + 1)]))
        for place, block in enumerate(reversed(downward))
    ]
    return downward, upward, depths.get("middle_block")


def _transformer_depths(down: Sequence[_Block], up: Sequence[_Block], middle: int | None) -> Config:
    """Return the fields for transformer layers: one list, and a second one if the upward blocks differ."""
    partly = [block for block in (*down, *up) if block.attends and 0 in block.depths]
    per_block = [block.common_depth() for block in down]
    if not down[-1].attends and middle is not None:
        per_block[-1] = middle  # diffusers uses the last block's number for the middle
    last = per_block[-1][0] if isinstance(per_block[-1], list) else per_block[-1]
    if partly or middle not in (None, last):
        raise ModelError("its UNet's attention layers fit no diffusers configuration; give a diffusers folder")
    mirrored = [block.common_depth() for block in up]
    alike = [
        isinstance(depth, int) and (not block.attends or depth == below)
        for depth, block, below in zip(mirrored, up, reversed(per_block), strict=True)
    ]
    if all(alike) and all(isinstance(depth, int) for depth in per_block):
        return {"transformer_layers_per_block": per_block}
    return {"transformer_layers_per_block": per_block, "reverse_transformer_layers_per_block": mirrored}


def _heads(widths: Sequence[int], family: Config) -> int | list[int]:
    """Return the numbers of heads: the family's number, or the widths divided by the family's head width."""
    heads = family["attention_head_dim"]  # a misnomer of diffusers
    if isinstance(heads, int):
        return heads
    return _divided(widths, by=family["block_out_channels"][0] // heads[0])


def _divided(widths: Sequence[int], *, by: int) -> list[int]:
    if any(width % by for width in widths):
        raise ModelError(f"its widths {list(widths)} are not multiples of {by}, the width of an attention head")
    return [width // by for width in widths]


# ---- the VAE ----


def derived_vae_config(shapes: Shapes, family: Config) -> Config:
    """Return the configuration of a VAE: widths, layers, channels; scale and shift are those of the family.

    Raises ModelError if the tensors are not those of an AutoencoderKL.
    """
    try:
        num_blocks = _how_many(shapes, "encoder.down.{}.")
        widths = [shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(num_blocks)]
        return {
            **family,
            "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * num_blocks,
            "up_block_types": ["UpDecoderBlock2D"] * num_blocks,
            "layers_per_block": _how_many(shapes, "encoder.down.0.block.{}."),
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in shapes,
        }
    except (KeyError, IndexError) as error:
        raise ModelError(f"its VAE's tensors are not those of SD or SDXL ({error})") from error


# ---- text encoders ----


def derived_clip_config(shapes: Shapes, family: Config) -> Config:
    """Return the configuration of a text encoder with transformers' names. Raises ModelError for other tensors."""
    prefix = "text_model."
    try:
        return {
            **_text_sizes(
                tokens=shapes[f"{prefix}embeddings.token_embedding.weight"],
                positions=shapes[f"{prefix}embeddings.position_embedding.weight"],
                feed_forward=shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"],
                family=family,
            ),
            "num_hidden_layers": _how_many(shapes, prefix + "encoder.layers.{}."),
        }
    except (KeyError, IndexError) as error:
        raise ModelError(f"its text encoder's tensors are not those of CLIP ({error})") from error


def derived_open_clip_config(shapes: Shapes, family: Config, *, unused_layers: int) -> Config:
    """Return the configuration of a text encoder with OpenCLIP's names.

    unused_layers: number of last layers that the UNet does not use. Raises ModelError for other tensors.
    """
    try:
        return {
            **_text_sizes(
                tokens=shapes["token_embedding.weight"],
                positions=shapes["positional_embedding"],
                feed_forward=shapes["transformer.resblocks.0.mlp.c_fc.weight"],
                family=family,
            ),
            "num_hidden_layers": _how_many(shapes, "transformer.resblocks.{}.") - unused_layers,
            **({"projection_dim": shapes["text_projection"][1]} if "text_projection" in shapes else {}),
        }
    except (KeyError, IndexError) as error:
        raise ModelError(f"its text encoder's tensors are not those of OpenCLIP ({error})") from error


def _text_sizes(
    *, tokens: Sequence[int], positions: Sequence[int], feed_forward: Sequence[int], family: Config
) -> Config:
    (heads,) = _divided([tokens[1]], by=family["hidden_size"] // family["num_attention_heads"])
    return {
        **family,
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "max_position_embeddings": positions[0],
        "intermediate_size": feed_forward[0],
        "num_attention_heads": heads,
    }


def _how_many(names: Iterable[str], pattern: str) -> int:
    """Return how many of the numbers 0, 1, 2 ... in the pattern give the beginning of a name."""
    names = list(names)
    return next(number for number in count() if not any(name.startswith(pattern.format(number)) for name in names))
