"""The names of a FLUX.1 transformer's tensors in single files (Black Forest Labs, ComfyUI), from diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ds_dpo.errors import ModelError
from ds_dpo.models.weights.in_file import InFile
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX

# what readers of single files take, because no shape shows it
READ_AS = {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
# modules outside the blocks: diffusers -> Black Forest Labs'
OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
# by kind of block: its name there, modules in it, and modules that are one matrix there
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
Joined = Mapping[str, tuple[str, ...]]
BLOCKS: dict[str, tuple[str, Mapping[str, str], Joined]] = {
    "transformer_blocks": (
        "double_blocks",
        DOUBLE,
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        SINGLE,
        {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
    ),
}
BLOCK = re.compile(r"(?P<kind>\w+)\.(?P<number>\d+)\.(?P<module>.+)\.(?P<parameter>weight|bias)")
NORM = re.compile(r".*norm\.(query|key)_norm")


def flux1_in_file(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, InFile]:
    """Return what a single file keeps of a transformer's tensors, by its names, prefix included.

    config: the transformer's diffusers configuration. Raises ModelError for one that single files cannot express.
    Source: the reverse of diffusers' convert_flux_transformer_checkpoint_to_diffusers; ComfyUI, model_detection.py.
    """
    for setting, taken in READ_AS.items():
        own = config.get(setting, taken)
        if (list(own) if isinstance(taken, list) else own) != taken:
            raise ModelError(
                f"--format single-file: {setting} {own}, but programs that read such a file take {taken}; use --format "
                "denoiser or pipeline"
            )
    return {UNET_PREFIX + name: place for name, place in map(_in_file, names)}


def _in_file(name: str) -> tuple[str, InFile]:
    match = BLOCK.fullmatch(name)
    if match is None or match["kind"] not in BLOCKS:
        module, _, parameter = name.rpartition(".")
        if module not in OUTER:
            raise _unknown(name)
        return f"{OUTER[module]}.{parameter}", InFile((name,), halves_swapped=module == "norm_out.linear")
    kind, number, module, parameter = match.groups()
    there, modules, joined = BLOCKS[kind]
    for whole, parts in joined.items():
        if module in parts:
            found = tuple(f"{kind}.{number}.{part}.{parameter}" for part in parts)
            return f"{there}.{number}.{whole}.{parameter}", InFile(found)
    if module not in modules:
        raise _unknown(name)
    named = modules[module]
    return f"{there}.{number}.{named}.{'scale' if NORM.fullmatch(named) else parameter}", InFile((name,))


def _unknown(name: str) -> ModelError:
    return ModelError(f"--format single-file: tensor {name!r} does not exist in a single file of FLUX.1")
