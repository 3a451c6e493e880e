from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from ds_dpo.evaluation.drawing.live_pipeline import build_pipeline
from ds_dpo.miniature.kinds import SDXL_KIND, Parts, save_parts
from ds_dpo.miniature.models import make_scheduler, make_text_parts, make_unet, make_vae
from ds_dpo.models.sampler import ddim_from


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained miniature, saved as the shipped one is."""
    folder = tmp_path_factory.mktemp("model") / "base"
    torch.manual_seed(0)
    save_parts(Parts(kind=SDXL_KIND, text=make_text_parts(), vae=make_vae(), denoiser=make_unet()), folder)
    return folder


@pytest.fixture
def pipeline() -> StableDiffusionXLPipeline:
    """An untrained miniature from live parts, in fp32."""
    torch.manual_seed(0)
    text = make_text_parts()
    return build_pipeline(
        denoiser=make_unet().eval(),
        vae=make_vae().eval(),
        scheduler=ddim_from(make_scheduler().config),
        tokenizers=(text.tokenizer, text.tokenizer_2),
        text_encoders=(text.encoder.eval(), text.encoder_2.eval()),
    )
