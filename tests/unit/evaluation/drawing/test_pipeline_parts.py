"""What a foreign pipeline's settings name is neither imported nor fetched when its images are drawn."""

import json
import os
import shutil

import pytest
import torch
from whole_file import small_sdxl, write_whole_file

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.model_folder import find_model, load_pipeline, pipeline_around
from ds_dpo.evaluation.drawing.single_file_model import find_single_file, load_single_file

# the name of a repository of the hub, whose code transformers would fetch and run
KERNEL = {"_attn_implementation": "kernels-community/x", "attn_implementation": "kernels-community/x"}


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(resolve_asset("ds_dpo://assets/miniature/model"), tmp_path / "model")


def test_text_encoders_take_torchs_attention_whatever_their_settings_name(folder, tmp_path):
    whole = small_sdxl()
    whole.save_pretrained(tmp_path / "rest")
    write_whole_file(whole, tmp_path / "whole.safetensors")
    for rest in (folder, tmp_path / "rest"):
        for part in ("text_encoder", "text_encoder_2"):
            change(rest / part / "config.json", **KERNEL)
    file = find_single_file("whole", tmp_path / "whole.safetensors", rest=tmp_path / "rest")
    drawn = [
        load_pipeline(find_model(str(folder), base=None)),
        pipeline_around(whole.unet, folder, name="a UNet alone"),
        load_single_file(file, dtype=torch.float32, vae=None),
    ]
    for pipeline in drawn:
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            assert encoder.config._attn_implementation == "sdpa"
    for name, value in whole.text_encoder_2.state_dict().items():
        assert torch.equal(drawn[2].text_encoder_2.state_dict()[name], value)


@pytest.mark.parametrize("part", ["scheduler", "vae"])
@pytest.mark.parametrize(
    "named",
    [
        ["transformers", "CLIPTextModel"],
        ["diffusers", "StableDiffusionXLPipeline"],  # a whole pipeline, whose parts nobody has looked at
        ["antigravity", "fly_id"],
        ["diffusers", "nothing"],
        "diffusers",
    ],
)
def test_a_part_of_another_library_is_refused(folder, part, named):
    change(folder / "model_index.json", **{part: named})
    with pytest.raises(ModelError, match=rf"model_index.json: {part} is .*of diffusers would fit"):
        load_pipeline(find_model(str(folder), base=None))


def test_parts_that_draw_nothing_are_not_read(folder):
    change(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    (folder / "image_encoder").mkdir()
    (folder / "image_encoder" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **KERNEL}))
    assert load_pipeline(find_model(str(folder), base=None)).image_encoder is None


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "vae/config.json"])
def test_a_named_pipe_is_not_opened(folder, file):
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(ModelError, match=r"is a named pipe, not a regular file"):
        load_pipeline(find_model(str(folder), base=None))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_quantized_weights_are_refused(folder, part):
    change(folder / part / "config.json", quantization_config={"quant_method": "nunchaku"})
    with pytest.raises(ModelError, match=rf"{part}/config.json: quantization_config is .*nunchaku.*; give weights in"):
        load_pipeline(find_model(str(folder), base=None))
