"""The weights of an open_clip model as a CLIPModel of transformers: names, fused projections, sizes from shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from ds_dpo.errors import ScorerError, cut

# numbers of each attention head in ViT-H-14; shapes do not show them
HEAD_WIDTHS = {"vision": 80, "text": 64}
PLAIN_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# open_clip multiplies a row by a matrix, transformers has a linear layer
TRANSPOSED_NAMES = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
FUSED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
COMPUTED = ("attn_mask",)  # a buffer of earlier versions


def clip_from_open_clip(tensors: Mapping[str, Tensor], tokenizer: Any, *, place: str) -> Any:
    """Return a CLIPModel with an open_clip model's weights, in fp32 on the host.

    tokenizer: names the token that ends a prompt. place: the beginning of an error's message. Raises ScorerError if
    tensors are missing, or are not those of such a model.
    """
    from transformers import CLIPModel

    try:
        config = _config(tensors, tokenizer)
        with init_empty_weights(include_buffers=False):
            model = CLIPModel(config)
        renamed = dict(_renamed(tensors))
        model.load_state_dict(renamed, strict=True, assign=True)
    except KeyError as error:
        raise ScorerError(f"{place} is no ViT of open_clip: it has no tensor {error.args[0]}") from error
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ScorerError(f"{place} is no ViT of open_clip ({cut(str(error), characters=400)})") from error
    return model


def _config(tensors: Mapping[str, Tensor], tokenizer: Any) -> Any:
    from transformers import CLIPConfig

    patches = tensors["visual.conv1.weight"]
    side = math.isqrt(len(tensors["visual.positional_embedding"]) - 1) * patches.shape[-1]
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    return CLIPConfig(
        text_config={
            **_tower(tensors, "", "text", text_width),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(tensors["positional_embedding"]),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **_tower(tensors, "visual.", "vision", patches.shape[0]),
            "image_size": side,
            "patch_size": patches.shape[-1],
        },
        projection_dim=tensors["text_projection"].shape[1],
    )


def _tower(tensors: Mapping[str, Tensor], prefix: str, kind: str, width: int) -> dict[str, Any]:
    blocks = f"{prefix}transformer.resblocks."
    numbers = [int(name.removeprefix(blocks).partition(".")[0]) for name in tensors if name.startswith(blocks)]
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors[f"{blocks}0.mlp.c_fc.weight"]),
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": width // HEAD_WIDTHS[kind],
        "hidden_act": "gelu",
    }


def _renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if name in PLAIN_NAMES:
            yield PLAIN_NAMES[name], tensor
        elif name in TRANSPOSED_NAMES:
            yield TRANSPOSED_NAMES[name], tensor.T.contiguous()
        elif (fused := FUSED.fullmatch(name)) is not None:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{_layer(fused)}.self_attn.{letter}_proj.{fused[3]}", part.clone()
        elif (block := BLOCK.fullmatch(name)) is not None and block[3] in BLOCK_NAMES:
            yield f"{_layer(block)}.{BLOCK_NAMES[block[3]]}.{block[4]}", tensor
        elif name not in COMPUTED:
            raise ValueError(f"it has a tensor {name}")


def _layer(match: re.Match[str]) -> str:
    return f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
