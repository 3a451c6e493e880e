"""The places of a VAE's and of CLIP text encoders' weights in a single file, by diffusers' and transformers' names.

The UNet's table is in ldm_keys. Source: the module names of CompVis' and Stability AI's autoencoders, of transformers'
CLIP before its version 5, and of OpenCLIP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """The tensor of a file that holds a parameter, and in which form.

    shares: how the rows are shared by all parameters that are joined there, in order, such as (1, 1, 1) for query, key
    and value; place: that of this parameter among them. halves_swapped: the second half of all rows comes first.
    is_transposed: the matrix is stored transposed. is_convolution: the matrix may be stored as a 1 x 1 convolution.
    """

    name: str
    shares: tuple[int, ...] = (1,)
    place: int = 0
    halves_swapped: bool = False
    is_transposed: bool = False
    is_convolution: bool = False

    def under(self, prefix: str) -> Stored:
        """Return the same place in a file whose names have a prefix."""
        return replace(self, name=prefix + self.name)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the parameter in a file's tensor, or the whole tensor if its rows cannot be shared in that way."""
        if self.halves_swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if len(self.shares) > 1 and len(tensor) % sum(self.shares) == 0:
            rows = len(tensor) // sum(self.shares)
            tensor = tensor.split([rows * share for share in self.shares])[self.place]
        if self.is_convolution:
            tensor = tensor.flatten(1)
        return tensor.T if self.is_transposed else tensor


# where parameters are in a file, by their names
Places = Callable[[Iterable[str]], Mapping[str, Stored]]


def same_names(names: Iterable[str]) -> Mapping[str, Stored]:
    """Map each name to itself, for a file with diffusers' names."""
    return {name: Stored(name) for name in names}


# ---- the VAE ----

_VAE_BLOCK = re.compile(
    r"(?P<side>encoder\.down|decoder\.up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|downsamplers|upsamplers)\."
    r"(?P<layer>\d+)\.(?P<rest>.+)"
)
_VAE_MIDDLE = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("conv_norm_out.", "norm_out."),
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_places(names: Iterable[str], *, num_blocks: int) -> Mapping[str, Stored]:
    """Map each of an AutoencoderKL's parameter names to its place in a single file; one to one."""
    return {name: _vae_place(name, num_blocks) for name in names}


def _vae_place(name: str, num_blocks: int) -> Stored:
    if match := _VAE_BLOCK.fullmatch(name):
        # LDM counts a decoder's blocks from the finest resolution
        is_down = match["side"] == "encoder.down"
        place = f"{match['side']}.{match['block'] if is_down else num_blocks - 1 - int(match['block'])}"
        if match["kind"] == "resnets":
            rest = match["rest"].replace("conv_shortcut.", "nin_shortcut.")
            return Stored(f"{place}.block.{match['layer']}.{rest}")
        return Stored(f"{place}.{'downsample' if is_down else 'upsample'}.{match['rest']}")
    for own, ldm in _VAE_MIDDLE:
        name = name.replace(own, ldm)
    start, middle, rest = name.partition("mid.attn_1.")
    if middle:
        module, _, parameter = rest.rpartition(".")
        is_matrix = parameter == "weight" and module != "group_norm"
        return Stored(f"{start}{middle}{_VAE_ATTENTION[module]}.{parameter}", is_convolution=is_matrix)
    return Stored(name)


# ---- text encoders ----

_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"encoder\.layers\.(?P<layer>\d+)\.(?P<module>.+)\.(?P<parameter>weight|bias)")
_THIRD = re.compile(r"self_attn\.(?P<which>[qkv])_proj")


def clip_places(names: Iterable[str]) -> Mapping[str, Stored]:
    """Map each of a CLIPTextModel's parameter names to its place in a file of SD1.5 or SDXL; one to one."""
    return {name: Stored(f"text_model.{name.removeprefix('text_model.')}") for name in names}


def open_clip_places(names: Iterable[str]) -> Mapping[str, Stored]:
    """Map each parameter name of a CLIPTextModel, with or without projection, to its place in an OpenCLIP encoder.

    Query, key and value have one place: they are stored as one projection.
    """
    return {name: _open_clip_place(name.removeprefix("text_model.")) for name in names}


def _open_clip_place(name: str) -> Stored:
    if name == "text_projection.weight":
        return Stored("text_projection", is_transposed=True)
    if name in _OPEN_CLIP:
        return Stored(_OPEN_CLIP[name])
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    block = f"transformer.resblocks.{match['layer']}"
    if third := _THIRD.fullmatch(match["module"]):
        return Stored(f"{block}.attn.in_proj_{match['parameter']}", shares=(1, 1, 1), place="qkv".index(third["which"]))
    return Stored(f"{block}.{_OPEN_CLIP_LAYER[match['module']]}.{match['parameter']}")
