"""A trained FLUX.1 in diffusers' form and in single files: read back by diffusers' own readers, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_flux1 import SHAPES, save_tiny_flux1, tiny_transformer
from zero_checkpoint import save_run

from ds_dpo.errors import ModelError
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request

WIDTH = 128
HEADS = {"attention_head_dim": WIDTH, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)}
DIFFUSERS_WIDTH = 3072  # its reader has the width of the published models as a constant


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux1(tmp_path_factory.mktemp("flux1_base") / "pipeline")


@pytest.fixture(scope="module")
def tuned(base: Path) -> FluxTransformer2DModel:
    """The base's transformer after a small change of every weight."""
    transformer = FluxTransformer2DModel.from_pretrained(str(base), subfolder="transformer")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return transformer


def save_transformer(run: Path, transformer: FluxTransformer2DModel, base: Path) -> Path:
    trained = {name: one.detach() for name, one in transformer.named_parameters() if one.requires_grad}
    frozen = {name: one.detach() for name, one in transformer.named_parameters() if not one.requires_grad}
    config = {**transformer.config, "_class_name": "FluxTransformer2DModel"}
    folder: Path = save_run(run, trained, base=base, frozen=frozen, config=config)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(base), "family": "flux1"}}))
    return folder


def export(folder: Path, out: Path, **options: Any) -> list[str]:
    said: list[str] = []
    consolidate(replace(Request(source=folder, out=out, dtype="fp32"), **options), say=said.append)
    return said


def test_a_whole_pipeline_in_shards_loads_in_diffusers(base: Path, tuned: Any, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "run", tuned, base)
    said = export(folder, tmp_path / "out", format="pipeline", max_shard_gb=2e-4, base=str(base))
    index = json.loads((tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    pipeline = FluxPipeline.from_pretrained(tmp_path / "out")
    found, expected = pipeline.transformer.state_dict(), tuned.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    images = pipeline("a red circle", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    card = (tmp_path / "out/README.md").read_text()
    assert "- flux\n" in card
    assert "guidance_scale=3.5" in card
    assert any("DiffusionPipeline.from_pretrained" in line for line in said)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_a_lora_has_every_layer_and_its_alpha(base: Path, tmp_path: Path, naming: str) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(str(base), subfolder="transformer").requires_grad_(False)
    targets = ["to_q", "add_q_proj", "to_out.0", "to_add_out", "net.0.proj", "proj_mlp", "proj_out", "norm.linear"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    folder = save_transformer(tmp_path / "run", transformer, base)
    transformer.peft_config["default"].save_pretrained(str(folder))
    said = export(folder, tmp_path / "out", format="lora", lora_naming=naming)
    trained = get_peft_model_state_dict(transformer, adapter_name="default")
    if naming == "diffusers":
        pipeline = FluxPipeline.from_pretrained(base)
        pipeline.load_lora_weights(tmp_path / "out")
        (name,) = pipeline.transformer.peft_config
        assert pipeline.transformer.peft_config[name].lora_alpha == 6
        loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[key], value) for key, value in trained.items())
        return
    (path,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(path)
    modules = {key.removesuffix(".lora_A.weight") for key in trained if key.endswith(".lora_A.weight")}
    assert {module.partition(".")[0] for module in modules} == {
        "transformer_blocks",
        "single_transformer_blocks",
        "proj_out",
    }
    assert len(found) == 3 * len(modules)
    for module in modules:  # as ComfyUI's model_lora_keys_unet names the layers of FLUX.1
        name = f"lora_transformer_{module.replace('.', '_')}"
        assert torch.equal(found[f"{name}.lora_down.weight"], trained[f"{module}.lora_A.weight"])
        assert torch.equal(found[f"{name}.lora_up.weight"], trained[f"{module}.lora_B.weight"])
        assert found[f"{name}.alpha"] == 6
    assert any("kohya's sd-scripts has other names for a transformer's layers" in line for line in said)


def diffusers_reader(width: int) -> FunctionType:
    """diffusers' own reader, for transformers of another width than the published ones."""
    theirs: Any = convert_flux_transformer_checkpoint_to_diffusers
    constants = theirs.__code__.co_consts
    assert DIFFUSERS_WIDTH in constants
    changed = tuple(width if constant == DIFFUSERS_WIDTH else constant for constant in constants)
    return FunctionType(theirs.__code__.replace(co_consts=changed), theirs.__globals__)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_single_file_is_what_diffusers_reads(tmp_path: Path, shape: str) -> None:
    """Its own reader of Black Forest Labs' names gives back every tensor to the bit, and leaves none over."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        transformer = tiny_transformer(shape, **HEADS)
    folder = save_transformer(tmp_path / "run", transformer, tmp_path / "gone")
    said = export(folder, tmp_path / "out.safetensors", format="single-file")
    file = load_file(tmp_path / "out.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in file)
    found, expected = diffusers_reader(WIDTH)(file), transformer.state_dict()
    assert not file, "the reader takes each tensor out"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert any("Load Diffusion Model" in line for line in said)


def test_heads_that_no_reader_knows_are_refused(base: Path, tuned: Any, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "run", tuned, base)
    with pytest.raises(ModelError, match=r"attention_head_dim 16, but programs that read such a file take 128"):
        export(folder, tmp_path / "out", format="single-file")
    assert not (tmp_path / "out").exists()
