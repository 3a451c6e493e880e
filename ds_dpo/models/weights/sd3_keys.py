"""The names of an SD3 transformer's tensors in single files (ComfyUI), from diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ds_dpo.errors import ModelError
from ds_dpo.models.weights.in_file import InFile
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX

HEAD_WIDTH = 64  # readers of single files know the width of all heads alone, and divide it by this
# modules outside the blocks: diffusers -> Stability's
OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# query, key and value are one matrix there
JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
JOINED_OF = {part: joined for joined, parts in JOINED.items() for part in parts}
TABLE, FILE_TABLE = "pos_embed.pos_embed", "pos_embed"
BLOCK = re.compile(r"transformer_blocks\.(?P<number>\d+)\.(?P<module>.+)\.(?P<parameter>weight|bias)")


def sd3_in_file(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, InFile]:
    """Return what a single file keeps of a transformer's tensors, by its names, prefix included.

    config: the transformer's diffusers configuration. Raises ModelError for one that single files cannot express.
    Source: the reverse of diffusers' convert_sd3_transformer_checkpoint_to_diffusers; ComfyUI, model_detection.py.
    """
    if config.get("attention_head_dim", HEAD_WIDTH) != HEAD_WIDTH:
        raise ModelError(
            f"--format single-file: attention_head_dim {config['attention_head_dim']}, but programs that read such a "
            f"file take {HEAD_WIDTH}; use --format denoiser or pipeline"
        )
    last = int(config["num_layers"]) - 1
    found = dict(_in_file(name, last=last) for name in names)
    return {UNET_PREFIX + name: place for name, place in found.items()}


def _in_file(name: str, *, last: int) -> tuple[str, InFile]:
    if name == TABLE:
        return FILE_TABLE, InFile((name,))
    match = BLOCK.fullmatch(name)
    if match is None:
        module, _, parameter = name.rpartition(".")
        if module not in OUTER:
            raise _unknown(name)
        return f"{OUTER[module]}.{parameter}", InFile((name,), halves_swapped=module == "norm_out.linear")
    number, module, parameter = int(match["number"]), match["module"], match["parameter"]
    block = f"joint_blocks.{number}"
    if module in JOINED_OF:
        joined = JOINED_OF[module]
        parts = tuple(f"transformer_blocks.{number}.{part}.{parameter}" for part in JOINED[joined])
        return f"{block}.{joined}.{parameter}", InFile(parts)
    if module not in IN_BLOCK:
        raise _unknown(name)
    # the last block's norm of the text is of the same kind as the last norm: it has scale and shift in another order
    is_swapped = module == "norm1_context.linear" and number == last
    return f"{block}.{IN_BLOCK[module]}.{parameter}", InFile((name,), halves_swapped=is_swapped)


def _unknown(name: str) -> ModelError:
    return ModelError(f"--format single-file: tensor {name!r} does not exist in a single file of SD3")
