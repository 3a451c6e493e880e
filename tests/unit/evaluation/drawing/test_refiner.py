"""Base and refiner draw what diffusers' documentation has them draw."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.model_folder import find_model, load_pipeline
from ds_dpo.evaluation.drawing.named_model import Loading
from ds_dpo.evaluation.drawing.refiner import find_refiner, load_refiner
from ds_dpo.evaluation.drawing.sampling import draw_images
from ds_dpo.models.sampler import ddim_from

LOADING = Loading(dtype="fp32", device=torch.device("cpu"), sampler="ddim")
PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def refiner_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner of the miniature's kind: the second text encoder alone, and five sizes."""
    base = StableDiffusionXLPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    config = dict(base.unet.config)
    encoder = base.text_encoder_2
    config["cross_attention_dim"] = encoder.config.hidden_size
    config["projection_class_embeddings_input_dim"] = (
        encoder.config.projection_dim + 5 * base.unet.config.addition_time_embed_dim
    )
    torch.manual_seed(1)
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=encoder,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=UNet2DConditionModel.from_config(config),
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    folder = tmp_path_factory.mktemp("refiner")
    refiner.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_base_and_refiner_draw_what_diffusers_draws(model_folder: Path, refiner_folder: Path) -> None:
    base = load_pipeline(find_model(str(model_folder), base=None))
    refiner = load_refiner(find_refiner(str(refiner_folder), variant=None), base, name="r", loading=LOADING)
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0}
    (drawn,) = draw_images(base, [PROMPT], [7], resolution=32, refiner=refiner, **settings)
    (alone,) = draw_images(base, [PROMPT], [7], resolution=32, **settings)
    assert (drawn - alone).abs().max() > 1e-3
    plain = StableDiffusionXLPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    plain.scheduler = ddim_from(plain.scheduler.config)
    second = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner_folder, torch_dtype=torch.float32)
    second.scheduler = ddim_from(second.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    latents = plain(
        PROMPT, generator=generator, height=32, width=32, denoising_end=0.8, output_type="latent", **settings
    ).images
    (wanted,) = second(
        PROMPT, image=latents, generator=generator, denoising_start=0.8, output_type="pt", **settings
    ).images
    assert (drawn - wanted).abs().max() < 1e-5


def test_what_is_no_refiner_is_refused(model_folder: Path, refiner_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"--refiner .*base: is a 'StableDiffusionXLPipeline'; give a diffusers folder"
    ):
        find_refiner(str(model_folder), variant=None)
    with pytest.raises(ModelError, match=r"has no model_index.json"):
        find_refiner(str(tmp_path), variant=None)
    with pytest.raises(ModelError, match="--refiner r: only SDXL takes a refiner, and its model is a object"):
        load_refiner(refiner_folder, object(), name="r", loading=LOADING)
