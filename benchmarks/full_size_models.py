"""Write SDXL with seeded values as a diffusers folder and as one file, tensor by tensor, and pairs to train it on.

Usage: python benchmarks/full_size_models.py FOLDER SCALE PIXELS, as full_size_step.py starts it. FOLDER gets
sdxl.safetensors, sdxl/ and pairs/pairs.csv.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from zero_files import unet_config, unet_shapes

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from whole_file import encoders_in_file  # noqa: E402 (the line above finds it)

from ds_dpo.config.asset_paths import resolve_asset  # noqa: E402
from ds_dpo.config.models import ModelConfig  # noqa: E402
from ds_dpo.export.tensors.safetensors_stream import TensorSpec, write_safetensors  # noqa: E402
from ds_dpo.models.pipelines.pretrained import open_pipeline  # noqa: E402
from ds_dpo.models.weights.ldm_keys import ldm_names  # noqa: E402

BF16 = torch.bfloat16
# Layers of a text encoder; SDXL's have 12 and 32, which the check of the denoiser needs not.
TEXT_LAYERS = 2
DEVIATION = 0.02
_DRAWN = 2**20


def write_models(folder: Path, *, scale: float) -> None:
    """Write SDXL, its UNet's widths times scale, in bf16, in both forms.

    VAE and widths of the text encoders are SDXL's own. With scale 1 it takes 2 x 5.7 GB of disk and 1 GB of memory.
    """
    as_file, as_folder = folder / "sdxl.safetensors", folder / "sdxl"
    config = _unet_config(scale)
    shapes = unet_shapes(config)
    first = _text_encoder("text_encoder", CLIPTextModel)
    second = _text_encoder("text_encoder_2", CLIPTextModelWithProjection)
    vae = _seeded(AutoencoderKL.from_config(json.loads((_shipped() / "vae" / "config.json").read_text())))
    _write_file(as_file, config, shapes, encoders_in_file(first, second, vae))
    _write_folder(as_folder, config, shapes, {"text_encoder": first, "text_encoder_2": second, "vae": vae})
    pipeline = open_pipeline(ModelConfig(pretrained=str(as_file)))
    for name in ("tokenizer", "tokenizer_2"):
        pipeline.tokenizer(name).save_pretrained(as_folder / name)


def write_pairs(folder: Path, *, number: int, pixels: int) -> None:
    """Write pairs of square images of noise, and the CSV that names them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    lines = ["prompt,chosen,rejected"]
    for pair in range(number):
        for side in ("chosen", "rejected"):
            noise = torch.randint(0, 256, (pixels, pixels, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).save(folder / f"{pair}_{side}.png")
        lines.append(f"noise number {pair},{pair}_chosen.png,{pair}_rejected.png")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


def _shipped() -> Path:
    return Path(resolve_asset("ds_dpo://assets/model_configs/sdxl"))


def _unet_config(scale: float) -> dict[str, Any]:
    """Return SDXL's own configuration, with other widths only for another scale."""
    shipped: dict[str, Any] = json.loads((_shipped() / "unet" / "config.json").read_text())
    if scale == 1:
        return shipped
    small = unet_config(scale)
    return shipped | {name: small[name] for name in ("block_out_channels", "attention_head_dim")}


def _text_encoder(name: str, kind: Callable[[CLIPTextConfig], nn.Module]) -> nn.Module:
    config = json.loads((_shipped() / name / "config.json").read_text())
    return _seeded(kind(CLIPTextConfig(**{**config, "num_hidden_layers": TEXT_LAYERS})))


def _seeded(module: nn.Module) -> nn.Module:
    """Give a module's parameters seeded values in bf16."""
    module.to(BF16)
    for name, parameter in module.named_parameters():
        parameter.data = _value(name, tuple(parameter.shape))
    return module


_drawn = (DEVIATION * torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))).to(BF16)


def _value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return 1 for a norm's weight, else values of deviation 0.02, which repeat and are so fast to draw."""
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape, dtype=BF16)
    numel = math.prod(shape)
    return _drawn.repeat(numel // _DRAWN + 1)[:numel].view(shape)


def _write_file(
    path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], others: dict[str, Tensor]
) -> None:
    in_file = ldm_names(shapes, config)
    values = {in_file[name]: (name, shape) for name, shape in shapes.items()}
    specs = [TensorSpec(name, shape, BF16) for name, (_, shape) in values.items()]
    specs += [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in others.items()]

    def produce(spec: TensorSpec) -> Tensor:
        return others[spec.name] if spec.name in others else _value(*values[spec.name])

    write_safetensors(path, specs, produce)


def _write_folder(
    folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], others: dict[str, nn.Module]
) -> None:
    # contents alone, as the shipped files may be read-only
    folder.mkdir()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(_shipped() / name, folder / name)
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec(name, shape, BF16) for name, shape in shapes.items()]
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write_safetensors(path, specs, lambda spec: _value(spec.name, spec.shape))
    for name, module in others.items():
        module.save_pretrained(folder / name)


if __name__ == "__main__":
    where, scale, pixels = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    write_models(where, scale=scale)
    write_pairs(where / "pairs", number=8, pixels=pixels)
