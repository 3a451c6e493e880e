from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.loading import file_weights, load_denoiser
from ds_dpo.models.weights import files as files_module
from ds_dpo.models.weights.files import DIFFUSERS_STEM, FileWeights, find_weights


def unet_folder(model: ModelConfig) -> Path:
    return Path(resolve_asset(model.pretrained), "unet")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "2MB"])
def test_whole_and_sharded_weights_of_a_variant_are_the_models_own(
    sdxl: ModelConfig, sdxl_copy: ModelConfig, variant: str | None, shard: str
) -> None:
    unet = load_denoiser(sdxl, dtype=torch.float32)
    torch.nn.init.constant_(unet.conv_in.weight, 1 / 3)  # what fp16 cannot hold
    folder = unet_folder(sdxl_copy)
    (folder / f"{DIFFUSERS_STEM}.safetensors").unlink()
    unet.save_pretrained(folder, variant=variant, max_shard_size=shard)
    model = sdxl_copy.model_copy(update={"variant": variant})
    weights = file_weights(model)
    assert len(find_weights(folder, DIFFUSERS_STEM, variant=variant).paths) == (1 if shard == "10GB" else 5)
    assert dict(weights).keys() == unet.state_dict().keys() == dict(unet.named_parameters()).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in unet.state_dict().items())


def test_file_weights_keep_the_dtype_of_the_file(sdxl: ModelConfig) -> None:
    assert {tensor.dtype for tensor in file_weights(sdxl).values()} == {torch.float16}


def test_file_weights_read_a_tensor_only_when_asked(sdxl: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real_open = files_module._open

    class Watched:
        def __init__(self, path: Path) -> None:
            self._file = real_open(path)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self._file.get_tensor(name)
            return tensor

    monkeypatch.setattr(files_module, "_open", Watched)
    weights = file_weights(sdxl)
    assert len(weights) == len(list(weights)) > 100
    assert "conv_in.weight" in weights
    assert read == ["conv_in.weight"] * len(read)
    read.clear()
    assert weights["conv_out.bias"].shape == (4,)
    assert read == ["conv_out.bias"]
    with pytest.raises(KeyError):
        weights["no_such.weight"]


def test_headers_give_the_number_of_parameters(sdxl: ModelConfig) -> None:
    unet = load_denoiser(sdxl, dtype=torch.float32)
    files = find_weights(unet_folder(sdxl), DIFFUSERS_STEM, variant=None)
    assert files.num_parameters() == sum(parameter.numel() for parameter in unet.parameters())
    assert files.num_bytes() == (unet_folder(sdxl) / f"{DIFFUSERS_STEM}.safetensors").stat().st_size


def test_a_missing_variant_names_what_is_there(sdxl: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"no diffusion_pytorch_model.fp16.safetensors, .* but diffusion_pytorch"):
        find_weights(unet_folder(sdxl), DIFFUSERS_STEM, variant="fp16")


def test_a_pickle_alone_is_refused(sdxl_copy: ModelConfig) -> None:
    folder = unet_folder(sdxl_copy)
    (folder / f"{DIFFUSERS_STEM}.safetensors").rename(folder / f"{DIFFUSERS_STEM}.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(diffusion_pytorch_model.bin\).*save_pretrained"):
        load_denoiser(sdxl_copy, dtype=torch.float32)


def test_a_torn_weight_file_is_named(sdxl_copy: ModelConfig) -> None:
    path = unet_folder(sdxl_copy) / f"{DIFFUSERS_STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.safetensors: cannot be read as safetensors"):
        FileWeights(find_weights(path.parent, DIFFUSERS_STEM, variant=None))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../../elsewhere.safetensors"}, "must name files in the same folder"),
        ({"a": 3}, "must name files in the same folder"),
        ({}, "must name files in the same folder"),
        ({"a": "shard-00001-of-00002.safetensors"}, "shard-00001-of-00002.safetensors: missing, but"),
    ],
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, weight_map: object, message: str) -> None:
    (tmp_path / f"{DIFFUSERS_STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message):
        find_weights(tmp_path, DIFFUSERS_STEM, variant=None)


def test_a_tensor_that_the_config_needs_and_the_file_lacks_is_an_error(sdxl_copy: ModelConfig) -> None:
    folder = unet_folder(sdxl_copy)
    config = json.loads((folder / "config.json").read_text())
    wider = UNet2DConditionModel.from_config({**config, "transformer_layers_per_block": [1, 2]})
    (folder / "config.json").write_text(json.dumps(dict(wider.config)))
    with pytest.raises(ModelError, match=r"unet: its weights lack \d+ tensors of its config, such as .*blocks\.1"):
        load_denoiser(sdxl_copy, dtype=torch.float32)
