"""Adapters start as nothing, are drawn from the run's seed alone, and can be switched off without a trace."""

import json

import pytest
import tiny_flux2
import torch
from peft.tuners.lora import LoraLayer
from tiny_sd3 import tiny_transformer

from ds_dpo.batch import Conditioning
from ds_dpo.config.load import load_config
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.models.denoiser.adapters import AdapterPart, adapters_disabled, add_adapter
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser
from ds_dpo.storage.state_files import write_files

TARGETS = ["to_q", "to_out.0", "conv1"]


def unet_of(sdxl, dtype=torch.float32):
    return load_denoiser(sdxl, dtype=dtype)


def with_adapter(sdxl, *, seed=3, dtype=torch.float32, **settings):
    unet = unet_of(sdxl, dtype)
    add_adapter(unet, AdapterConfig(**{"type": "lora", "rank": 4, "targets": TARGETS, **settings}), seed=seed)
    return unet


@torch.no_grad()
def prediction(unet):
    generator = torch.Generator().manual_seed(0)
    conditioning = Conditioning(
        text_states=torch.randn(2, 3, 96, generator=generator),
        pooled=torch.randn(2, 48, generator=generator),
        extras={"time_ids": torch.ones(2, 6)},
    )
    return predict_by_unet(unet, torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5, 900]), conditioning)


def trained(unet):
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def move(unet):
    with torch.no_grad():
        for parameter in trained(unet).values():
            parameter.add_(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_policy_starts_as_the_reference_and_can_be_it_again(sdxl, kind, dtype):
    base = prediction(unet_of(sdxl, dtype))
    unet = with_adapter(sdxl, type=kind, dtype=dtype)
    assert torch.equal(prediction(unet), base)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert all(".lora_" in name for name in trained(unet))
    move(unet)
    moved = prediction(unet)
    assert not torch.equal(moved, base)
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    with adapters_disabled(unet):
        assert torch.equal(prediction(unet), base)
        assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert torch.equal(prediction(unet), moved)


def test_first_values_follow_from_seed_and_name_alone(sdxl):
    torch.manual_seed(1)
    first = trained(with_adapter(sdxl))
    torch.manual_seed(2)
    again, other = trained(with_adapter(sdxl, targets=["to_q"])), trained(with_adapter(sdxl, seed=4))
    downs = [name for name in first if ".lora_A." in name]
    for name in downs:
        assert not torch.equal(first[name], other[name])
        bound = first[name][0].numel() ** -0.5
        assert 0.9 * bound < first[name].abs().max() <= bound
        assert abs(first[name].mean()) < 0.2 * bound
    # other layers beside it change nothing for a layer
    assert 0 < len(again) < len(first)
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert all(not value.any() for name, value in first.items() if ".lora_B." in name)
    assert len({first[name].flatten()[0].item() for name in downs}) == len(downs)


@pytest.mark.parametrize(("kind", "alpha", "scale"), [("lora", 6, 1.5), ("rslora", 6, 3), ("lora", None, 1)])
def test_scale(sdxl, kind, alpha, scale):
    unet = with_adapter(sdxl, type=kind, alpha=alpha)
    assert {layer.scaling["default"] for layer in unet.modules() if isinstance(layer, LoraLayer)} == {scale}


def test_target_without_a_layer_is_refused(sdxl):
    with pytest.raises(ConfigError, match=r"adapter.targets to_querry: no linear or convolution layer.*to_q"):
        with_adapter(sdxl, targets=["to_k", "to_querry"])


def test_part_writes_pefts_settings_and_refuses_another_base(sdxl, tmp_path):
    unet = with_adapter(sdxl, type="rslora", alpha=6)
    part = AdapterPart(unet, seed=0, rank=0)
    write_files(part.files(), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 6, "use_rslora": True, "use_dora": False, "bias": "none"}
    assert {name: settings[name] for name in expected} == expected
    assert sorted(settings["target_modules"]) == sorted(TARGETS)
    assert AdapterPart(unet, seed=0, rank=1).files() == []
    part.restore(part.state(), tmp_path)
    move(unet)  # what is trained is no part of the base
    AdapterPart(unet, seed=0, rank=0).restore(part.state(), tmp_path)
    with torch.no_grad():
        unet.conv_out.bias += 1e-3
    with pytest.raises(CheckpointError, match=r"trained on other weights than model.pretrained now holds"):
        AdapterPart(unet, seed=0, rank=0).restore(part.state(), tmp_path)


def test_dropout_follows_from_seed_step_and_rank(sdxl):
    unet = with_adapter(sdxl, dropout=0.5)
    move(unet)

    def after(step, *, rank=0):
        part = AdapterPart(unet, seed=0, rank=rank)
        torch.rand(7)
        part.after_step(step, {})
        return prediction(unet)

    assert torch.equal(after(3), after(3))
    assert not torch.equal(after(3), after(4))
    assert not torch.equal(after(3), after(3, rank=1))
    resumed = AdapterPart(unet, seed=0, rank=0)
    before = AdapterPart(unet, seed=0, rank=0)
    before.after_step(3, {})
    torch.manual_seed(9)
    resumed.restore(before.state(), None)
    assert torch.equal(prediction(unet), after(3))


def test_options_without_an_adapter_are_refused():
    with pytest.raises(ConfigError, match=r"adapter.rank 4 has no effect with adapter.type none"):
        load_config(["--config", "miniature", "--adapter.rank", "4"])


def test_parts_of_the_unet_are_not_chosen_beside_an_adapter():
    with pytest.raises(ConfigError, match=r"model.freeze conv_in.\* has no effect with adapter.type dora"):
        load_config(["--config", "miniature", "--adapter.type", "dora", "--model.freeze", "conv_in.*"])


def test_a_file_without_adapter_inherits_no_setting_of_one(tmp_path):
    (tmp_path / "lora.yaml").write_text("base: miniature\nadapter: {type: lora, rank: 4}\n")
    assert load_config([f"--config={tmp_path / 'lora.yaml'}", "--rank=8"]).config.adapter.rank == 8
    assert load_config([f"--config={tmp_path / 'lora.yaml'}", "--adapter.type=none"]).config.adapter == AdapterConfig()


IN_BLOCKS = ("attention", "attention+mlp", "all")


@pytest.mark.parametrize("shape", ["sd3", "sd35_medium"])
def test_layers_are_named_by_their_kind(shape):
    """3 blocks of SD3: the last has no output for the text, and in sd35_medium the first two attend twice."""
    text_projections, image_projections = 3 + 3 + 3 + 2, 3 * 4
    attention = text_projections + image_projections + (2 * 4 if shape == "sd35_medium" else 0)
    feed_forward = 2 * (3 + 2)
    # patches, two embedders of two layers, text, two norms a block, last norm and projection
    others = 1 + 4 + 1 + 2 * 3 + 2
    expected = {"attention": attention, "attention+mlp": attention + feed_forward}
    expected["all"] = expected["attention+mlp"] + others
    for name in IN_BLOCKS:
        transformer = tiny_transformer(shape)
        add_adapter(transformer, AdapterConfig(type="lora", rank=2, targets=[name]), seed=3)
        assert sum(isinstance(module, LoraLayer) for module in transformer.modules()) == expected[name], name


def test_a_kind_of_layers_names_a_unets_too(sdxl):
    unet = unet_of(sdxl)
    layers = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    add_adapter(unet, AdapterConfig(type="lora", rank=2, targets=["attention"]), seed=3)
    found = {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    assert found == {name for name in layers if ".attn1." in name or ".attn2." in name}
    assert found


def test_a_target_may_name_other_modules_beside_its_layers():
    """FLUX.2's to_out is a layer in single blocks, and a list of layers in double ones."""
    transformer = tiny_flux2.tiny_transformer()
    add_adapter(transformer, AdapterConfig(type="lora", rank=2, targets=["to_out"]), seed=3)
    changed = {name.partition(".lora_")[0] for name in trained(transformer)}
    assert changed == {f"single_transformer_blocks.{block}.attn.to_out" for block in range(2)}
