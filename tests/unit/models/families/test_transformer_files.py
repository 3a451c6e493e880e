"""Transformers in the files of ComfyUI and Black Forest Labs, as model.denoiser_init: the same weights, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_flux1
import tiny_sd3
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from zero_checkpoint import save_run

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.streaming import open_denoiser_stream

PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Kind:
    """A family's tiny pipeline with heads of the width that programs take which read such a file."""

    module: ModuleType
    save: Callable[[Path], Path]
    heads: dict[str, Any]
    joined: str


KINDS = {
    "sd3": Kind(
        module=tiny_sd3,
        save=tiny_sd3.save_tiny_sd3,
        heads={"attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64},
        joined="joint_blocks.0.x_block.attn.qkv.weight",
    ),
    "flux1": Kind(
        module=tiny_flux1,
        save=tiny_flux1.save_tiny_flux1,
        heads={"attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)},
        joined="single_blocks.0.linear1.weight",
    ),
}
each_family = pytest.mark.parametrize("family", list(KINDS))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor], Path]]:
    """Of each family a pipeline, other weights of its transformer, and a file of these as ComfyUI reads it."""
    folder = tmp_path_factory.mktemp("files")
    return {family: _of(folder / family, family) for family in KINDS}


def _of(folder: Path, family: str) -> tuple[Path, dict[str, Tensor], Path]:
    kind = KINDS[family]
    pipeline = kind.save(folder / "pipeline")
    transformers = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformers.append(kind.module.tiny_transformer(**kind.heads))
    transformers[0].save_pretrained(pipeline / "transformer")
    other = transformers[1]
    trained = {name: parameter.detach() for name, parameter in other.named_parameters()}
    config = {**other.config, "_class_name": type(other).__name__}
    checkpoint = save_run(folder / "run", trained, base=pipeline, config=config)
    (folder / "run/config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(pipeline), "family": family}}))
    file = folder / "file.safetensors"
    consolidate(Request(source=checkpoint, out=file, dtype="fp32", format="single-file"), say=lambda line: None)
    return pipeline, other.state_dict(), file


def model_of(pipeline: Path, family: str, file: Path) -> ModelConfig:
    return ModelConfig(pretrained=str(pipeline), family=family, denoiser_init=str(file))


@each_family
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_a_transformer_in_one_file_is_read_to_the_bit(files: Any, tmp_path: Path, family: str, prefix: str) -> None:
    pipeline, expected, file = files[family]
    own = tmp_path / "own.safetensors"
    save_file({prefix + name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}, own)
    model = model_of(pipeline, family, own)
    found = load_denoiser(model, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stream = open_denoiser_stream(model, dtype=torch.float32)
    empty = stream.empty(device=torch.device("cpu"))
    streamed = {name: tensor for _, name, tensor in stream.parameters(empty)}
    assert streamed.keys() == dict(empty.named_parameters()).keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed.items())


@each_family
def test_a_joined_matrix_of_another_size_and_scales_are_refused_by_name(
    files: Any, tmp_path: Path, family: str
) -> None:
    pipeline, _, file = files[family]
    tensors, joined = load_file(file), PREFIX + KINDS[family].joined
    longer = torch.cat([tensors[joined], torch.zeros(4, tensors[joined].shape[1])])
    save_file({**tensors, joined: longer}, tmp_path / "longer.safetensors")
    with pytest.raises(ModelError, match=rf"0\..* of shape \({len(longer)}, "):
        load_denoiser(model_of(pipeline, family, tmp_path / "longer.safetensors"), dtype=torch.float32)
    scale = joined.removesuffix("weight") + "scale_weight"
    save_file({**tensors, scale: torch.ones(())}, tmp_path / "scaled.safetensors")
    with pytest.raises(ModelError, match=rf"{scale} scales weights of 8 bits"):
        load_denoiser(model_of(pipeline, family, tmp_path / "scaled.safetensors"), dtype=torch.float32)
    del tensors[joined]
    save_file(tensors, tmp_path / "shorter.safetensors")
    with pytest.raises(ModelError, match=rf"lacks 1 tensors, such as {joined}"):
        load_denoiser(model_of(pipeline, family, tmp_path / "shorter.safetensors"), dtype=torch.float32)


@each_family
def test_scales_in_a_folder_are_refused_too(files: Any, tmp_path: Path, family: str) -> None:
    pipeline, _, _ = files[family]
    shutil.copytree(pipeline, tmp_path / "pipeline")
    (file,) = (tmp_path / "pipeline" / "transformer").glob("*.safetensors")
    save_file({**load_file(file), "scaled_fp8": torch.ones(())}, file)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.safetensors: scaled_fp8 scales weights of 8 bits"):
        load_denoiser(ModelConfig(pretrained=str(tmp_path / "pipeline"), family=family), dtype=torch.float32)


@each_family
def test_a_whole_pipeline_in_one_file_is_refused_with_the_way_in(files: Any, family: str) -> None:
    _, _, file = files[family]
    with pytest.raises(ModelError, match=r"in one file; give a diffusers folder as model.pretrained and this file as"):
        load_denoiser(ModelConfig(pretrained=str(file), family=family), dtype=torch.float32)
