"""A UNet in a single file: read back by diffusers, and everything else of the base file as it was."""

import json
import struct
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from unet_shapes import TINY_SD15, TINY_SDXL, tiny_unet
from zero_checkpoint import save_zero2

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.errors import ModelError
from ds_dpo.export.card.modelspec import describe_model
from ds_dpo.export.single_file import read_base_file, single_file_shapes, write_single_file
from ds_dpo.models.families.table import FAMILIES, family_of
from ds_dpo.models.weights.files import read_json
from ds_dpo.models.weights.ldm_keys import ldm_names
from ds_dpo.zero_shards.reader import open_checkpoint

METADATA = {"modelspec.title": "tuned"}


def checkpoint_of(unet, folder):
    return open_checkpoint(save_zero2(folder, unet.state_dict()))


def base_file(path, config, *, metadata=None, leave_out=None):
    """A whole single-file checkpoint around a UNet: text encoder and VAE in other dtypes, one of a single odd byte."""
    unet = {name: torch.ones(shape).half() for name, shape in single_file_shapes(config).items() if name != leave_out}
    others = {
        "cond_stage_model.transformer.position_ids": torch.arange(77)[None],
        "first_stage_model.decoder.conv_in.weight": torch.randn(5, 3),
        "conditioner.embedders.0.scale": torch.randn(3, 3, dtype=torch.float64),
        "flag": torch.tensor([7], dtype=torch.uint8),
        "model_ema.decay": torch.tensor([0.5]).bfloat16(),
    }
    save_file({**unet, **others}, path, metadata=metadata)
    return others


@pytest.mark.parametrize("config", [TINY_SDXL, TINY_SD15], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_alone_it_comes_back_through_diffusers(tmp_path, config, dtype):
    unet = tiny_unet(config, seed=2)
    path = tmp_path / "tuned.safetensors"
    write_single_file(path, checkpoint_of(unet, tmp_path / "tag"), config, dtype=dtype, metadata=METADATA)
    back = convert_ldm_unet_checkpoint(load_file(path), unet.config)
    assert back.keys() == unet.state_dict().keys()
    assert all(torch.equal(back[name], weight.to(dtype)) for name, weight in unet.state_dict().items())


@pytest.mark.parametrize("config", [TINY_SDXL, TINY_SD15], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_base_file_all_else_stays(tmp_path, config, dtype):
    unet = tiny_unet(config, seed=3)
    own = {"modelspec.author": "someone", "modelspec.title": "base", "modelspec.hash_sha256": "0xabc"}
    others = base_file(tmp_path / "base.safetensors", config, metadata=own)
    base, path = read_base_file(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    weights = checkpoint_of(unet, tmp_path / "tag")
    write_single_file(path, weights, config, dtype=dtype, metadata=METADATA, base=base)
    found = load_file(path)
    names = ldm_names(unet.state_dict(), config)
    assert found.keys() == {*others, *names.values()}
    assert all(
        (found[name].dtype, found[name].tolist()) == (kept.dtype, kept.tolist()) for name, kept in others.items()
    )
    assert all(torch.equal(found[names[name]], weight.to(dtype)) for name, weight in unet.state_dict().items())
    with safe_open(path, framework="pt") as file:
        # the base's checksum is of weights that are no longer there
        assert file.metadata() == {"modelspec.author": "someone", "modelspec.title": "tuned"}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = [entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"]
    starts = {entry["dtype"]: entry["data_offsets"][0] for entry in entries}
    assert starts["I64"] % 8 == starts["F64"] % 8 == starts["F32"] % 4 == 0


@pytest.mark.parametrize("dtype", [torch.float16])
def test_another_unet_in_the_base_file_is_refused(tmp_path, dtype):
    weights = checkpoint_of(tiny_unet(TINY_SDXL, seed=4), tmp_path / "tag")
    leave_out = "model.diffusion_model.middle_block.1.norm.bias"
    path = tmp_path / "base.safetensors"
    for config, missing, said in (
        (TINY_SDXL, leave_out, rf"1 tensors differ; the first, '{leave_out}', is absent in the file and \(16,\)"),
        (TINY_SD15, None, r"the first, 'model.diffusion_model.input_blocks.1.1"),
    ):
        base_file(path, config, leave_out=missing)
        with pytest.raises(ModelError, match=said):
            write_single_file(tmp_path / "out", weights, TINY_SDXL, dtype=dtype, metadata={}, base=read_base_file(path))
    save_file({"conv_in.weight": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"no tensor under 'model.diffusion_model.'"):
        write_single_file(tmp_path / "out", weights, TINY_SDXL, dtype=dtype, metadata={}, base=read_base_file(path))
    path.write_bytes(b"no header")
    with pytest.raises(ModelError, match=r"base.safetensors: cannot be read as safetensors"):
        read_base_file(path)
    assert not (tmp_path / "out").exists()


def test_modelspec():
    sdxl = describe_model({**TINY_SDXL, "sample_size": 128}, title="mine", prediction_type="epsilon")
    assert sdxl["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    for family, predicts, expected in (
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base"),
        ("sdxl_refiner", "epsilon", "stable-diffusion-xl-v1-refiner"),
        ("sd15", "epsilon", "stable-diffusion-v1"),
        ("sd21", "v_prediction", "stable-diffusion-v2-768-v"),
        ("sd21", "epsilon", "stable-diffusion-v2-512"),
    ):
        config = read_json(Path(resolve_asset(f"ds_dpo://assets/model_configs/{family}/unet/config.json")))
        described = describe_model(config, title="mine", prediction_type=predicts)
        assert described["modelspec.architecture"] == expected
        assert family_of(config) is FAMILIES[family]
    assert sdxl["modelspec.resolution"] == "1024x1024"
    assert sdxl["modelspec.prediction_type"] == "epsilon"
    sd15 = describe_model({**TINY_SD15, "sample_size": [64, 96]}, title="mine", prediction_type=None, is_lora=True)
    assert sd15["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert sd15["modelspec.resolution"] == "768x512"
    assert "modelspec.prediction_type" not in sd15
