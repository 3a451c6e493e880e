"""A trained FLUX.2-klein in diffusers' form: read back by its own pipeline, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_flux2 import save_tiny_flux2
from zero_checkpoint import save_run

from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux2(tmp_path_factory.mktemp("flux2_base") / "pipeline")


def changed(base: Path) -> Any:
    transformer = Flux2Transformer2DModel.from_pretrained(str(base), subfolder="transformer")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return transformer


def export(run: Path, transformer: Any, start: Path, out: Path, **options: Any) -> None:
    trained = {name: one.detach() for name, one in transformer.named_parameters() if one.requires_grad}
    frozen = {name: one.detach() for name, one in transformer.named_parameters() if not one.requires_grad}
    config = {**transformer.config, "_class_name": "Flux2Transformer2DModel"}
    folder = save_run(run, trained, base=start, frozen=frozen, config=config)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(start), "family": "flux2_klein"}}))
    if getattr(transformer, "peft_config", None):
        transformer.peft_config["default"].save_pretrained(str(folder))
    consolidate(replace(Request(source=folder, out=out, dtype="fp32"), **options), say=lambda line: None)


def test_a_whole_pipeline_loads_in_diffusers(base: Path, tmp_path: Path) -> None:
    tuned = changed(base)
    export(tmp_path / "run", tuned, base, tmp_path / "out", format="pipeline", base=str(base))
    pipeline = Flux2KleinPipeline.from_pretrained(tmp_path / "out")
    found, expected = pipeline.transformer.state_dict(), tuned.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    assert pipeline(prompt="a red circle", **settings).images.shape == (1, 32, 32, 3)
    assert "- flux2\n" in (tmp_path / "out/README.md").read_text()


def test_a_lora_has_every_layer_and_its_alpha(base: Path, tmp_path: Path) -> None:
    transformer = changed(base).requires_grad_(False)
    targets = [
        "to_q",
        "add_q_proj",
        "to_out.0",
        "single_transformer_blocks.0.attn.to_out",
        "to_qkv_mlp_proj",
        "linear_in",
    ]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    export(tmp_path / "run", transformer, base, tmp_path / "out", format="lora")
    trained = get_peft_model_state_dict(transformer, adapter_name="default")
    pipeline = Flux2KleinPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "out")
    (name,) = pipeline.transformer.peft_config
    assert pipeline.transformer.peft_config[name].lora_alpha == 6
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], value) for key, value in trained.items())


def test_files_that_no_program_is_known_to_read_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"known to read a LoRA of flux2_klein .* --lora_naming diffusers"):
        export(tmp_path / "lora", changed(base), base, tmp_path / "out", format="lora", rank=2, lora_naming="kohya")
    with pytest.raises(ModelError, match=r"single files of FLUX\.2 are neither read nor written"):
        export(tmp_path / "run", changed(base), base, tmp_path / "out", format="single-file")
    assert not (tmp_path / "out").exists()
