"""LoRA exports against peft's own arithmetic and diffusers' own loader."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from unet_shapes import TINY_SD15, TINY_SDXL, tiny_unet
from zero_checkpoint import save_zero2

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.export.denoiser import expected_shapes
from ds_dpo.export.lora.adapter import file_layers, find_adapter, is_untrained, merge_adapter, read_part
from ds_dpo.export.lora.file import DIFFUSERS_NAME, diffusers_metadata, kohya_metadata, write_lora_file
from ds_dpo.export.lora.svd import ChangeLora, decompose
from ds_dpo.export.tensors.verification import measure_distance
from ds_dpo.zero_shards.reader import open_checkpoint

MINIATURE = resolve_asset("ds_dpo://assets/miniature/model")
TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"]
CASES = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"mid_block.*.conv1": 3}},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


def add_lora(unet, seed=5, **settings):
    """Let peft add an adapter, as a trainer does, and give all of it values."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(target_modules=TARGETS, init_lora_weights="gaussian", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def save_lora_run(folder, unet, *, held=torch.float32, frozen_too=True):
    """Checkpoint of a LoRA run: the adapter trained, all else frozen in dtype held; settings as peft saves them."""
    trained = {name: value.detach() for name, value in unet.named_parameters() if value.requires_grad}
    frozen = {name: value.detach().to(held) for name, value in unet.named_parameters() if not value.requires_grad}
    save_zero2(folder, trained, frozen=frozen if frozen_too else {})
    unet.peft_config["default"].save_pretrained(folder)
    return open_checkpoint(folder)


def merged_by_peft(unet):
    for module in unet.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    return {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items() if ".lora_" not in name}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [TINY_SDXL, TINY_SD15], ids=["sdxl", "sd15"])
def test_merged_weights_are_those_of_peft(tmp_path, case, config):
    unet = add_lora(tiny_unet(config, seed=6), **CASES[case])
    checkpoint = save_lora_run(tmp_path / "tag", unet)
    adapter = find_adapter(checkpoint)
    merged, expected = merge_adapter(checkpoint, adapter, None), merged_by_peft(unet)
    assert merged.parameters.keys() == expected_shapes(config).keys() == expected.keys()
    for name, weight in expected.items():
        assert merged.parameters[name].shape == weight.shape
        torch.testing.assert_close(merged.read(name), weight, rtol=1e-5, atol=1e-6)


def test_frozen_weights_get_their_digits_back(tmp_path):
    unet = tiny_unet(TINY_SDXL, seed=7).half().float()
    base = {name: weight.half() for name, weight in unet.state_dict().items()}
    checkpoint = save_lora_run(tmp_path / "tag", add_lora(unet, r=2, lora_alpha=2), held=torch.bfloat16)
    adapter = find_adapter(checkpoint)
    assert not torch.equal(
        merge_adapter(checkpoint, adapter, None).read("conv_in.weight"), base["conv_in.weight"].float()
    )
    assert torch.equal(merge_adapter(checkpoint, adapter, base).read("conv_in.weight"), base["conv_in.weight"].float())
    # another base's weights are not taken
    other = {name: weight + 1 for name, weight in base.items()}
    found = merge_adapter(checkpoint, adapter, other).read("conv_in.weight")
    assert torch.equal(found, base["conv_in.weight"].bfloat16().float())


def test_a_checkpoint_of_the_lora_alone_is_merged_into_the_base(tmp_path):
    unet = tiny_unet(TINY_SDXL, seed=8)
    base = {name: weight.clone() for name, weight in unet.state_dict().items()}
    checkpoint = save_lora_run(tmp_path / "tag", add_lora(unet, r=2, lora_alpha=2), frozen_too=False)
    merged = merge_adapter(checkpoint, find_adapter(checkpoint), base)
    for name, weight in merged_by_peft(unet).items():
        torch.testing.assert_close(merged.read(name), weight, rtol=1e-5, atol=1e-6)


def write_adapter(path, checkpoint, config, *, naming, dtype=torch.float32):
    adapter = find_adapter(checkpoint)
    layers = file_layers(checkpoint, adapter, expected_shapes(config))
    metadata = diffusers_metadata(layers, adapter.settings) if naming == "diffusers" else kohya_metadata(layers, config)

    def produce(module, part):
        return read_part(checkpoint, adapter, module, part)

    write_lora_file(path, layers, produce, naming=naming, dtype=dtype, metadata=metadata)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_diffusers_file_loads_as_it_was_trained(tmp_path, case):
    unet = add_lora(UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet"), **CASES[case])
    checkpoint = save_lora_run(tmp_path / "tag", unet)
    write_adapter(tmp_path / DIFFUSERS_NAME, checkpoint, unet.config, naming="diffusers")
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    pipeline.load_lora_weights(tmp_path)
    (name,) = pipeline.unet.peft_config
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name=name)
    trained = get_peft_model_state_dict(unet, adapter_name="default")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], value) for key, value in trained.items())
    expected = merged_by_peft(unet)
    for key, weight in merged_by_peft(pipeline.unet).items():  # the scale came along
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)
    assert str(tmp_path) not in json.dumps(pipeline.unet.peft_config[name].to_dict(), default=str)


@pytest.mark.parametrize("case", ["plain", "rslora", "patterns"])
def test_kohya_file_loads_with_its_scale(tmp_path, case):
    unet = add_lora(UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet"), **CASES[case])
    checkpoint = save_lora_run(tmp_path / "tag", unet)
    write_adapter(tmp_path / "kohya.safetensors", checkpoint, unet.config, naming="kohya")
    trained = get_peft_model_state_dict(unet, adapter_name="default")
    by_diffusers = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in trained.items()})
    assert load_file(tmp_path / "kohya.safetensors").keys() == by_diffusers.keys()
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    pipeline.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    expected = merged_by_peft(unet)
    for key, weight in merged_by_peft(pipeline.unet).items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)


def test_dora_has_no_kohya_names(tmp_path):
    checkpoint = save_lora_run(tmp_path / "tag", add_lora(tiny_unet(TINY_SDXL, seed=9), **CASES["dora"]))
    with pytest.raises(ConfigError, match=r"this is a DoRA.*--format denoiser or single-file"):
        write_adapter(tmp_path / "x.safetensors", checkpoint, TINY_SDXL, naming="kohya")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_scale_must_be_known(tmp_path):
    unet = add_lora(tiny_unet(TINY_SDXL, seed=10), r=4, lora_alpha=6)
    checkpoint = save_lora_run(tmp_path / "tag", unet)
    with pytest.raises(ConfigError, match=r"--lora_alpha 5: .* says 6"):
        find_adapter(checkpoint, lora_alpha=5)
    settings = tmp_path / "tag" / "adapter_config.json"
    settings.unlink()
    with pytest.raises(ConfigError, match=r"adapter_config.json is missing.*lora_alpha / rank.*add --lora_alpha"):
        find_adapter(checkpoint)
    assert {layer.scale for layer in find_adapter(checkpoint, lora_alpha=6).layers.values()} == {1.5}
    settings.write_text(json.dumps({"lora_alpha": 6, "bias": "all"}))
    with pytest.raises(CheckpointError, match="bias 'all'"):
        find_adapter(checkpoint)
    settings.write_text("[]")
    with pytest.raises(CheckpointError, match="not the settings of a LoRA"):
        find_adapter(checkpoint)


@pytest.mark.slow
def test_a_lora_that_did_not_move_is_seen(tmp_path):
    unet = tiny_unet(TINY_SDXL, seed=11)
    unet.add_adapter(LoraConfig(target_modules=TARGETS, r=2, lora_alpha=2))
    checkpoint = save_lora_run(tmp_path / "start", unet)
    assert is_untrained(checkpoint, find_adapter(checkpoint))
    trained = save_lora_run(tmp_path / "trained", add_lora(tiny_unet(TINY_SDXL, seed=11), r=2, lora_alpha=2))
    assert not is_untrained(trained, find_adapter(trained))


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (16, 16)])
def test_decomposition_is_the_best_of_its_rank(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(12))
    values = torch.linalg.svdvals(change)
    up, down = decompose(change, 3)
    assert (change - up @ down).norm() ** 2 == pytest.approx(float((values[3:] ** 2).sum()), rel=1e-4)
    for factor in (up, down.mT):  # balanced: both hold the root of each singular value
        torch.testing.assert_close(torch.linalg.vector_norm(factor, dim=0) ** 2, values[:3], rtol=1e-4, atol=0)
    change[:, 1:] = 0  # of rank 1: the other factors are zero, not NaN
    up, down = decompose(change, 3)
    torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-5)


def tuned_miniature():
    """The miniature's UNet with changes in layers alone: what a LoRA can hold."""
    unet = UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet").eval()
    base = {name: weight.clone() for name, weight in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1 and "mid_block" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return unet, base


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_full_rank_predicts_as_the_tuned_unet(tmp_path, naming):
    unet, base = tuned_miniature()
    checkpoint = open_checkpoint(save_zero2(tmp_path / "tag", unet.state_dict()))
    change = ChangeLora(checkpoint, base, measure_distance(checkpoint, base), rank=10**6, dtype=torch.float32)
    layers = change.layers()
    assert not any("mid_block" in module for module in layers)  # it did not change
    metadata = diffusers_metadata(layers, {}) if naming == "diffusers" else kohya_metadata(layers, unet.config)
    path = tmp_path / "x.safetensors"
    write_lora_file(path, layers, change.produce, naming=naming, dtype=torch.float32, metadata=metadata)
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    generator = torch.Generator().manual_seed(14)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 3, 96, generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 48, generator=generator), "time_ids": torch.ones(2, 6)},
    }
    with torch.no_grad():
        tuned, found = unet(**inputs).sample, pipeline.unet(**inputs).sample
        pipeline.disable_lora()
        before = pipeline.unet(**inputs).sample
    assert (found - tuned).abs().max() < 1e-5
    assert (before - tuned).abs().max() > 1e-2
    assert "energy kept at rank 1000000: 100.00%" in change.describe()[0]


def test_energy_by_hand(tmp_path):
    base = {"a.weight": torch.zeros(4, 4), "a.bias": torch.zeros(4), "norm.weight": torch.ones(4)}
    tuned = {
        "a.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])),
        "a.bias": torch.tensor([0.0, 1.0, 0.0, 0.0]),
        "norm.weight": torch.tensor([1.0, 1.0, 1.0, 2.0]),
    }
    checkpoint = open_checkpoint(save_zero2(tmp_path / "tag", tuned))
    change = ChangeLora(checkpoint, base, measure_distance(checkpoint, base), rank=1, dtype=torch.float32)
    layers = change.layers()
    path = tmp_path / "x.safetensors"
    write_lora_file(path, layers, change.produce, naming="diffusers", dtype=torch.float32, metadata={})
    found = load_file(path)
    product = found["unet.a.lora_B.weight"] @ found["unet.a.lora_A.weight"]
    torch.testing.assert_close(product, torch.diag(torch.tensor([3.0, 0, 0, 0])))
    # squared: 9 + 4 + 1 in the layer, 1 in the bias, 1 in the norm; 9 kept
    energy, lost = change.describe()
    assert "56.25% of the squared difference from the base, 64.29% of that in 1 layers" in energy
    assert "2 biases and norms hold 12.50%" in lost
