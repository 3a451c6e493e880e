"""Files of a model that are torn, or whose settings make no sense, end in one line that names them."""

import json
import os
import shutil

import pytest

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import DsDpoError, ModelError
from ds_dpo.models import loading
from ds_dpo.models.families.table import kind_of
from ds_dpo.models.weights.parts import ATTENTION_OF_TEXT

MINIATURE = resolve_asset("ds_dpo://assets/miniature/model")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MINIATURE, tmp_path / "model")


def load_all(folder):
    model = ModelConfig(pretrained=str(folder))
    loading.read_noise_schedule(model)
    loading.load_denoiser(model, dtype=loading.torch_dtype("fp32"))
    loading.load_vae(model)
    return loading.load_text(model, dtype=loading.torch_dtype("fp32"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("left", [0, 7, 1000, -5])
def test_a_torn_file_is_named(folder, part, left):
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match=rf"{path.name}: cannot be read as safetensors"):
        load_all(folder)


def test_a_named_pipe_is_not_opened(folder):
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DsDpoError, match=r"text_encoder"):
        load_all(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"_class_name": ["UNet2DConditionModel"]}),
        ("unet/config.json", {"block_out_channels": "many"}),
        ("unet/config.json", {"down_block_types": []}),
        ("unet/config.json", {"cross_attention_dim": -1}),
        ("unet/config.json", {"in_channels": None}),
        ("vae/config.json", {"latent_channels": [4]}),
        ("vae/config.json", {"block_out_channels": {}}),
        ("text_encoder/config.json", {"hidden_size": "wide"}),
        ("text_encoder/config.json", {"num_attention_heads": 0}),
        ("text_encoder_2/config.json", {"projection_dim": None}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}),
        ("scheduler/scheduler_config.json", {"beta_start": 1e30}),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}),
        ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}),
        ("scheduler/scheduler_config.json", {"trained_betas": "x"}),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}),
        ("model_index.json", {"unet": "x"}),
    ],
)
def test_absurd_settings_end_in_one_line(folder, file, changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if file == "model_index.json":
        load_all(folder)  # training names its parts itself
        return
    with pytest.raises(DsDpoError) as refused:
        load_all(folder)
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize("name", [["UNet2DConditionModel"], {}, None, 3, "x" * 10**6])
def test_a_class_of_another_type_is_refused(name):
    with pytest.raises(ModelError, match=r"UNet2DConditionModel, SD3Transformer2DModel, .* would fit") as refused:
        kind_of({"_class_name": name})
    assert len(str(refused.value)) < 500


def test_text_encoders_take_torchs_attention_whatever_their_settings_name(folder):
    for part in ("text_encoder", "text_encoder_2"):
        path = folder / part / "config.json"
        kernel = {"_attn_implementation": "kernels-community/x", "attn_implementation": "kernels-community/x"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **kernel}))
    for tower in load_all(folder).towers:
        assert tower.encoder.config._attn_implementation == ATTENTION_OF_TEXT == "sdpa"
