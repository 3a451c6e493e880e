"""A trained Stable Diffusion 3 in diffusers' form: read back by its own pipeline, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_sd3 import SHAPES, save_tiny_sd3, tiny_transformer
from zero_checkpoint import save_run

from ds_dpo.errors import ModelError
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request

HEADS = {"attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64}
TABLE = "pos_embed.pos_embed"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3_base") / "pipeline")


@pytest.fixture(scope="module")
def tuned(base: Path) -> SD3Transformer2DModel:
    """The base's transformer after a small change of every weight."""
    transformer = SD3Transformer2DModel.from_pretrained(str(base), subfolder="transformer")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return transformer


def save_transformer(run: Path, transformer: SD3Transformer2DModel, base: Path) -> Path:
    """A run whose checkpoint holds the parameters alone, as ZeRO does: no table of positions."""
    trained = {name: one.detach() for name, one in transformer.named_parameters() if one.requires_grad}
    frozen = {name: one.detach() for name, one in transformer.named_parameters() if not one.requires_grad}
    config = {**transformer.config, "_class_name": "SD3Transformer2DModel"}
    folder: Path = save_run(run, trained, base=base, frozen=frozen, config=config)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(base), "family": "sd3"}}))
    return folder


def export(folder: Path, out: Path, **options: Any) -> list[str]:
    said: list[str] = []
    consolidate(replace(Request(source=folder, out=out, dtype="fp32"), **options), say=said.append)
    return said


def test_a_whole_pipeline_in_shards_loads_in_diffusers(base: Path, tuned: Any, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "run", tuned, base)
    said = export(folder, tmp_path / "out", format="pipeline", max_shard_gb=5e-5, base=str(base))
    index = json.loads((tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    found, expected = pipeline.transformer.state_dict(), tuned.state_dict()
    assert found.keys() == expected.keys()
    assert TABLE in found
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    images = pipeline("a red circle", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    card = (tmp_path / "out/README.md").read_text()
    assert "- stable-diffusion-3\n" in card
    assert any(line.startswith("distance from the base") or "relative" in line for line in said), said
    assert any("DiffusionPipeline.from_pretrained" in line for line in said)


def test_the_table_is_computed_where_the_base_is_gone(base: Path, tuned: Any, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "run", tuned, tmp_path / "gone")
    export(folder, tmp_path / "out")
    found = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(found[TABLE], tuned.state_dict()[TABLE])


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_a_lora_has_every_layer_and_its_alpha(base: Path, tmp_path: Path, naming: str) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(str(base), subfolder="transformer").requires_grad_(False)
    targets = ["to_q", "add_q_proj", "to_out.0", "to_add_out", "net.0.proj"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    folder = save_transformer(tmp_path / "run", transformer, base)
    transformer.peft_config["default"].save_pretrained(str(folder))
    export(folder, tmp_path / "out", format="lora", lora_naming=naming)
    trained = get_peft_model_state_dict(transformer, adapter_name="default")
    if naming == "diffusers":
        pipeline = StableDiffusion3Pipeline.from_pretrained(base)
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
    assert len(found) == 3 * len(modules)
    for module in modules:  # as ComfyUI's model_lora_keys_unet names the layers of SD3
        name = f"lora_transformer_{module.replace('.', '_')}"
        assert torch.equal(found[f"{name}.lora_down.weight"], trained[f"{module}.lora_A.weight"])
        assert torch.equal(found[f"{name}.lora_up.weight"], trained[f"{module}.lora_B.weight"])
        assert found[f"{name}.alpha"] == 6


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_single_file_is_what_diffusers_reads(tmp_path: Path, shape: str) -> None:
    """Its own reader of Stability's names gives back every tensor to the bit, and leaves none over."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        transformer = tiny_transformer(shape, **HEADS)
    folder = save_transformer(tmp_path / "run", transformer, tmp_path / "gone")
    export(folder, tmp_path / "out.safetensors", format="single-file")
    file = load_file(tmp_path / "out.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in file)
    found, expected = convert_sd3_transformer_checkpoint_to_diffusers(file), transformer.state_dict()
    assert not file, "the reader takes each tensor out"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_single_file_keeps_all_else_of_its_base_file(tmp_path: Path) -> None:
    transformer = tiny_transformer(**HEADS)
    folder = save_transformer(tmp_path / "run", transformer, tmp_path / "gone")
    export(folder, tmp_path / "alone.safetensors", format="single-file")
    alone = load_file(tmp_path / "alone.safetensors")
    others = {"first_stage_model.x": torch.randn(3), "text_encoders.clip_l.x": torch.randn(2, 2)}
    save_file({**{name: torch.zeros_like(one) for name, one in alone.items()}, **others}, tmp_path / "base.safetensors")
    export(folder, tmp_path / "whole.safetensors", format="single-file", base_file=tmp_path / "base.safetensors")
    found = load_file(tmp_path / "whole.safetensors")
    assert found.keys() == alone.keys() | others.keys()
    assert all(torch.equal(found[name], one) for name, one in {**alone, **others}.items())


def test_heads_that_no_reader_knows_are_refused(base: Path, tuned: Any, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "run", tuned, base)
    with pytest.raises(ModelError, match=r"attention_head_dim 8, but programs that read such a file take 64"):
        export(folder, tmp_path / "out", format="single-file")
    assert not (tmp_path / "out").exists()
