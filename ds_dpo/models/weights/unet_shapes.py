"""Names and shapes of the UNets of Stable Diffusion 1, 2 and XL, without the 5 seconds that importing diffusers takes.

Only configurations with known settings get an answer; diffusers builds any other. A test compares with diffusers.
Source: diffusers 0.42.1, models/unets/unet_2d_condition.py and what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]
ATTENTION_OF = {  # block type -> whether its layers have attention
    "DownBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "UpBlock2D": False,
    "CrossAttnUpBlock2D": True,
}
FREE = {  # settings that do not change any weight's shape
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "center_input_sample",
    "downsample_padding",
    "dropout",
    "flip_sin_to_cos",
    "freq_shift",
    "mid_block_scale_factor",
    "norm_eps",
    "resnet_out_scale_factor",
    "sample_size",
    "upcast_attention",
}
FIXED: dict[str, tuple[Any, ...]] = {  # settings with the values that are known here
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
UNSEEN_SETTINGS: dict[str, Any] = {  # settings that change what a UNet predicts, but no shape; diffusers' defaults
    "act_fn": "silu",
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "center_input_sample": False,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
DEFAULTS: dict[str, Any] = {
    "addition_embed_type": None,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 1280,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "use_linear_projection": False,
}


def known_shapes(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return names and shapes of the parameters, or None if a setting of the configuration is not known here."""
    is_known = all(
        key in FREE or key in DEFAULTS or value in FIXED.get(key, ()) for key, value in config.items()
    ) and config.get("addition_embed_type") in (None, "text_time")
    settings = {**DEFAULTS, **{key: value for key, value in config.items() if key in DEFAULTS}}
    if not is_known or not _fits(settings):
        return None
    return dict(_unet(settings))


def _fits(settings: Mapping[str, Any]) -> bool:
    """Return whether lists have one length, widths are whole numbers, and heads divide them."""
    channels = settings["block_out_channels"]
    number = len(channels)
    heads = settings["attention_head_dim"]  # a misnomer of diffusers
    lists = [_each(settings[key], number) for key in ("layers_per_block", "transformer_layers_per_block")]
    lists += [_each(heads, number), list(channels)]
    types = [*settings["down_block_types"], *settings["up_block_types"]]
    return (
        all(len(values) == number and all(type(value) is int and value > 0 for value in values) for values in lists)
        and len(settings["down_block_types"]) == len(settings["up_block_types"]) == number
        and all(kind in ATTENTION_OF for kind in types)
        and all(width % count == 0 for width, count in zip(channels, _each(heads, number), strict=True))
        and type(settings["cross_attention_dim"]) is int
        and type(settings["norm_num_groups"]) is int
        and all(width % settings["norm_num_groups"] == 0 for width in channels)
        and (settings["addition_embed_type"] is None or type(settings["projection_class_embeddings_input_dim"]) is int)
    )


def _each(value: Any, number: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * number


def _unet(settings: Mapping[str, Any]) -> Named:
    channels = list(settings["block_out_channels"])
    number, first = len(channels), channels[0]
    time_width = 4 * first
    yield from _convolution("conv_in", settings["in_channels"], first, settings["conv_in_kernel"])
    yield from _embedding("time_embedding", first, time_width)
    if settings["addition_embed_type"] is not None:
        yield from _embedding("add_embedding", settings["projection_class_embeddings_input_dim"], time_width)
    layers = _each(settings["layers_per_block"], number)
    depths = _each(settings["transformer_layers_per_block"], number)
    for place, kind in enumerate(settings["down_block_types"]):
        widths = [channels[max(place - 1, 0)] if layer == 0 else channels[place] for layer in range(layers[place])]
        depth = depths[place] if ATTENTION_OF[kind] else 0
        yield from _block(f"down_blocks.{place}", widths, channels[place], depth, time_width, settings)
        if place < number - 1:
            yield from _convolution(f"down_blocks.{place}.downsamplers.0.conv", channels[place], channels[place], 3)
    last = channels[-1]
    for layer in range(2):
        yield from _resnet(f"mid_block.resnets.{layer}", last, last, time_width)
    yield from _transformer("mid_block.attentions.0", last, depths[-1], settings)
    for place, kind in enumerate(settings["up_block_types"]):
        mirrored = number - 1 - place
        depth = depths[mirrored] if ATTENTION_OF[kind] else 0
        widths = _up_widths(channels, mirrored, layers[mirrored] + 1)
        yield from _block(f"up_blocks.{place}", widths, channels[mirrored], depth, time_width, settings)
        if place < number - 1:
            yield from _convolution(f"up_blocks.{place}.upsamplers.0.conv", channels[mirrored], channels[mirrored], 3)
    yield from _norm("conv_norm_out", first)
    yield from _convolution("conv_out", first, settings["out_channels"], settings["conv_out_kernel"])


def _up_widths(channels: Sequence[int], place: int, num_layers: int) -> list[int]:
    """Return input widths of an upward block's layers: from below or the previous layer, plus the skip connection."""
    own, below = channels[place], channels[min(place + 1, len(channels) - 1)]
    skipped = [own] * (num_layers - 1) + [channels[max(place - 1, 0)]]
    return [(below if layer == 0 else own) + skipped[layer] for layer in range(num_layers)]


def _block(
    name: str, widths: Sequence[int], own: int, depth: int, time_width: int, settings: Mapping[str, Any]
) -> Named:
    for layer, width in enumerate(widths):
        yield from _resnet(f"{name}.resnets.{layer}", width, own, time_width)
        if depth:
            yield from _transformer(f"{name}.attentions.{layer}", own, depth, settings)


def _resnet(name: str, width: int, own: int, time_width: int) -> Named:
    yield from _norm(f"{name}.norm1", width)
    yield from _convolution(f"{name}.conv1", width, own, 3)
    yield from _linear(f"{name}.time_emb_proj", time_width, own)
    yield from _norm(f"{name}.norm2", own)
    yield from _convolution(f"{name}.conv2", own, own, 3)
    if width != own:
        yield from _convolution(f"{name}.conv_shortcut", width, own, 1)


def _transformer(name: str, width: int, depth: int, settings: Mapping[str, Any]) -> Named:
    yield from _norm(f"{name}.norm", width)
    for projection in ("proj_in", "proj_out"):
        if settings["use_linear_projection"]:
            yield from _linear(f"{name}.{projection}", width, width)
        else:
            yield from _convolution(f"{name}.{projection}", width, width, 1)
    for layer in range(depth):
        block = f"{name}.transformer_blocks.{layer}"
        for attention, source in (("attn1", width), ("attn2", settings["cross_attention_dim"])):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, source)
            yield f"{block}.{attention}.to_v.weight", (width, source)
            yield from _linear(f"{block}.{attention}.to_out.0", width, width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", width)
        # gated: two times four times the width
        yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)
        yield from _linear(f"{block}.ff.net.2", 4 * width, width)


def _embedding(name: str, width: int, own: int) -> Named:
    yield from _linear(f"{name}.linear_1", width, own)
    yield from _linear(f"{name}.linear_2", own, own)


def _linear(name: str, width: int, own: int) -> Named:
    yield f"{name}.weight", (own, width)
    yield f"{name}.bias", (own,)


def _convolution(name: str, width: int, own: int, kernel: int) -> Named:
    yield f"{name}.weight", (own, width, kernel, kernel)
    yield f"{name}.bias", (own,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
