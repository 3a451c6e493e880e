"""Each kind of adapter on each family's transformer: nothing at its start, and what it was trained to elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file
from tiny_flux1 import save_tiny_flux1
from tiny_flux2 import save_tiny_flux2
from tiny_sd3 import save_tiny_sd3
from torch import Tensor
from zero_checkpoint import save_run

from ds_dpo.batch import Conditioning
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request
from ds_dpo.models.denoiser.adapters import adapters_disabled, add_adapter
from ds_dpo.models.families.table import FAMILIES

RANK, ALPHA = 4, 6
# what a LoRA's product is multiplied by (arXiv:2106.09685, arXiv:2312.03732)
SCALES = {"lora": ALPHA / RANK, "rslora": ALPHA / RANK**0.5}
KINDS = ("lora", "rslora", "dora")


@dataclass(frozen=True)
class Family:
    """A family's tiny pipeline and its classes in diffusers."""

    save: Callable[[Path], Path]
    transformer: Any
    pipeline: Any


CASES = {
    "sd3": Family(save_tiny_sd3, SD3Transformer2DModel, StableDiffusion3Pipeline),
    "flux1": Family(save_tiny_flux1, FluxTransformer2DModel, FluxPipeline),
    "flux2_klein": Family(save_tiny_flux2, Flux2Transformer2DModel, Flux2KleinPipeline),
}
each_family = pytest.mark.parametrize("family", list(CASES))
each_kind = pytest.mark.parametrize("kind", KINDS)
each_target = pytest.mark.parametrize("target", ["attention", "attention+mlp", "all"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: case.save(folder / name) for name, case in CASES.items()}


def transformer_of(base: Path, family: str) -> Any:
    return CASES[family].transformer.from_pretrained(str(base), subfolder="transformer")


def adapted(base: Path, family: str, kind: str, target: str) -> Any:
    transformer = transformer_of(base, family)
    add_adapter(transformer, AdapterConfig(type=kind, rank=RANK, alpha=ALPHA, targets=[target]), seed=3)
    return transformer


@torch.no_grad()
def prediction(transformer: Any, family: str) -> Tensor:
    denoiser, config = FAMILIES[family].denoiser, transformer.config
    generator = torch.Generator().manual_seed(0)
    conditioning = Conditioning(
        text_states=torch.randn(2, 5, config.joint_attention_dim, generator=generator),
        pooled=torch.randn(2, config.get("pooled_projection_dim", 1), generator=generator),
        extras={"guidance": torch.full((2,), 2.5)} if config.get("guidance_embeds") else {},
    )
    latents = torch.randn(2, denoiser.packing.latent_channels(config), 4, 4, generator=generator)
    return denoiser.predict(transformer, latents, torch.tensor([5.0, 900.0]), conditioning)


@torch.no_grad()
def move(transformer: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def save_checkpoint(run: Path, transformer: Any, base: Path, family: str) -> Path:
    trained = {name: one.detach() for name, one in transformer.named_parameters() if one.requires_grad}
    frozen = {name: one.detach() for name, one in transformer.named_parameters() if not one.requires_grad}
    config = {**transformer.config, "_class_name": CASES[family].transformer.__name__}
    folder: Path = save_run(run, trained, base=base, frozen=frozen, config=config)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(base), "family": family}}))
    transformer.peft_config["default"].save_pretrained(str(folder))
    return folder


def export(folder: Path, out: Path, **options: Any) -> Path:
    consolidate(Request(source=folder, out=out, dtype="fp32", **options), say=lambda line: None)
    return out


@each_family
@each_kind
@each_target
def test_it_starts_as_the_reference_and_loads_in_diffusers_as_it_was_trained(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str, target: str
) -> None:
    base = bases[family]
    expected = prediction(transformer_of(base, family), family)
    transformer = adapted(base, family, kind, target)
    assert torch.equal(prediction(transformer, family), expected)
    move(transformer)
    moved = prediction(transformer, family)
    assert (moved - expected).abs().max() > 1e-3
    with adapters_disabled(transformer):
        assert torch.equal(prediction(transformer, family), expected)
    folder = save_checkpoint(tmp_path / "run", transformer, base, family)
    pipeline = CASES[family].pipeline.from_pretrained(base)
    pipeline.load_lora_weights(export(folder, tmp_path / "lora", format="lora"))
    torch.testing.assert_close(prediction(pipeline.transformer, family), moved, rtol=0, atol=1e-5)
    merged = export(folder, tmp_path / "merged", format="denoiser", base=str(base))
    loaded = CASES[family].transformer.from_pretrained(merged, subfolder="transformer")
    torch.testing.assert_close(prediction(loaded, family), moved, rtol=0, atol=1e-5)


@each_target
@pytest.mark.parametrize("family", ["sd3", "flux1"])
@pytest.mark.parametrize("kind", list(SCALES))
def test_comfyui_reads_every_layer_with_its_scale(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str, target: str
) -> None:
    """ComfyUI adds alpha / rank times up times down to a weight (comfy/weight_adapter/lora.py)."""
    transformer = adapted(bases[family], family, kind, target)
    move(transformer)
    folder = save_checkpoint(tmp_path / "run", transformer, bases[family], family)
    (path,) = export(folder, tmp_path / "lora", format="lora", lora_naming="kohya").glob("*.safetensors")
    file = load_file(path)
    weights = dict(transformer.named_parameters())
    layers = sorted(name.removesuffix(".lora_A.default.weight") for name in weights if ".lora_A." in name)
    assert len(file) == 3 * len(layers)
    for layer in layers:
        down, up = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        own = f"lora_transformer_{layer.replace('.', '_')}"
        found = file[f"{own}.alpha"] / RANK * product(file[f"{own}.lora_up.weight"], file[f"{own}.lora_down.weight"])
        torch.testing.assert_close(found, (SCALES[kind] * product(up, down)).detach(), rtol=1e-5, atol=1e-6)


def product(up: Tensor, down: Tensor) -> Tensor:
    """Return up times down of a linear or a convolution layer, (outputs, inputs)."""
    return up.flatten(1) @ down.flatten(1)
