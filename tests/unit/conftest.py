"""Pipelines to load: the shipped miniature of SDXL, a copy of it to damage, and a random SD1.5 of the same size."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig

# before DeepSpeed is imported; without it a run needs a GPU
os.environ.setdefault("DS_ACCELERATOR", "cpu")

MINIATURE = "ds_dpo://assets/miniature/model"


@pytest.fixture
def sdxl() -> ModelConfig:
    return ModelConfig(pretrained=MINIATURE)


@pytest.fixture
def sdxl_copy(tmp_path: Path) -> ModelConfig:
    """A pipeline that a test may change."""
    # contents alone, as the shipped files may be read-only
    folder = shutil.copytree(resolve_asset(MINIATURE), tmp_path / "sdxl", copy_function=shutil.copyfile)
    for inside in (folder, *folder.iterdir()):
        inside.chmod(0o755)
    return ModelConfig(pretrained=str(folder))


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    # slow to import, and few files of tests need it
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from ds_dpo.miniature.models import make_scheduler, make_text_parts, make_vae

    torch.manual_seed(0)
    text = make_text_parts()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=48,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=CLIPTextModel(text.encoder.config),
        tokenizer=text.tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("sd15")
    pipeline.save_pretrained(folder)
    return ModelConfig(pretrained=str(folder), family="sd15")
