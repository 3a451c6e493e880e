from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.fixture(scope="session")
def models(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The untrained miniature, and an export of its UNet alone, of step 7, with other weights."""
    unet = UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    folder = tmp_path_factory.mktemp("tuned")
    unet.save_pretrained(folder / "unet")
    (folder / "export.json").write_text('{"step": 7, "files": []}')
    return {"one": str(model_folder), "two": str(folder)}
