from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_sd3 import save_tiny_sd3

from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.model_folder import find_model, load_pipeline
from ds_dpo.evaluation.drawing.named_model import Loading, ModelChoice, find_models, load_model
from ds_dpo.evaluation.drawing.sampling import draw_images

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def tuned(model_folder: Path, tmp_path: Path) -> Path:
    """An export of a UNet alone, of step 7, whose weights differ from the base's."""
    unet = UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    folder = tmp_path / "tuned"
    unet.save_pretrained(folder / "unet")
    (folder / "export.json").write_text('{"step": 7, "files": []}')
    return folder


def test_names_what_is_there_instead_of_a_model(model_folder: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"consolidate\.py"):
        find_model(str(tmp_path / "run"), base=None)
    with pytest.raises(ModelError, match="neither model_index"):
        find_model(str(tmp_path), base=None)
    with pytest.raises(ModelError, match="the base must be a whole pipeline"):
        find_model(str(tuned), base=None)
    assert find_model(str(tuned), base=find_model(str(model_folder), base=None)).rest == model_folder


def test_a_unet_that_lacks_weights_is_refused(model_folder: Path, tuned: Path) -> None:
    weights = load_file(tuned / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, tuned / WEIGHTS)
    model = find_model(str(tuned), base=find_model(str(model_folder), base=None))
    with pytest.raises(ModelError, match=r"conv_out\.bias"):
        load_pipeline(model)


def test_torn_or_missing_weights_are_refused(model_folder: Path, tuned: Path) -> None:
    model = find_model(str(tuned), base=find_model(str(model_folder), base=None))
    (tuned / WEIGHTS).write_bytes((tuned / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_pipeline(model)
    (tuned / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_pipeline(model)


def test_a_pipeline_of_another_family_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "AuraFlowPipeline"}')
    with pytest.raises(ModelError, match="AuraFlowPipeline"):
        load_pipeline(find_model(str(tmp_path), base=None))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        load_pipeline(find_model(str(tmp_path), base=None))


@pytest.mark.parametrize("with_t5", [True, False])
def test_stable_diffusion_3_draws_as_its_own_pipeline(tmp_path: Path, with_t5: bool) -> None:
    folder = save_tiny_sd3(tmp_path / "sd3", with_t5=with_t5)
    (found,) = find_models([ModelChoice(str(folder))], base=None, variant=None)
    pipeline = load_model(found, Loading(dtype="fp32", device=torch.device("cpu"), sampler="ddim"))
    assert (pipeline.text_encoder_3 is None) != with_t5
    drawing = {"num_inference_steps": 2, "guidance_scale": 4.0}
    images = draw_images(pipeline, ["a red circle"], [5], resolution=32, **drawing)
    theirs = StableDiffusion3Pipeline.from_pretrained(
        folder, **({} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None})
    )
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = theirs("a red circle", latents=noise, height=32, width=32, output_type="pt", **drawing).images
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
