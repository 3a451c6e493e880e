"""The kinds of files that tests/fuzz.py damages: for each, small whole files, and the reader that meets them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_data_kinds import DATA_KINDS
from fuzz_files import Prepare, Prepared
from fuzz_scorer_kinds import SCORER_KINDS

from ds_dpo.config.asset_paths import resolve_asset

# ---- checkpoints ----


def _checkpoint(folder: Path) -> Path:
    import torch
    from zero_checkpoint import save_run

    weights = {"a.weight": torch.arange(300.0).view(20, 15), "a.bias": torch.ones(20), "b.weight": torch.zeros(7, 7)}
    save_run(folder / "run", weights, base="/nowhere")
    return folder / "run" / "checkpoints" / "step_00000007"


def _manifest(folder: Path) -> Prepared:
    from ds_dpo.storage.manifest import newest_valid_checkpoint, verify_manifest

    checkpoint = _checkpoint(folder)

    def read() -> None:
        newest_valid_checkpoint(checkpoint.parent)
        verify_manifest(checkpoint)

    return Prepared([checkpoint / "manifest.json"], read)


def _shards(folder: Path) -> Prepared:
    from ds_dpo.zero_shards.reader import open_checkpoint

    checkpoint = _checkpoint(folder)
    (checkpoint / "manifest.json").unlink()  # whose checksums would refuse every change before the reader sees it

    def read() -> None:
        opened = open_checkpoint(checkpoint, verify=True)
        for name in opened.parameters:
            opened.read(name)

    return Prepared(sorted(checkpoint.glob("*.pt")), read)


# ---- models ----


def _model(folder: Path) -> Path:
    shutil.copytree(resolve_asset("ds_dpo://assets/miniature/model"), folder / "model")
    return folder / "model"


def _loads(model: Path) -> dict[str, Callable[[], Any]]:
    import torch

    from ds_dpo.config.models import ModelConfig
    from ds_dpo.models.loading import load_denoiser, load_text, load_vae, read_noise_schedule

    config = ModelConfig(pretrained=str(model))
    text = lambda: load_text(config, dtype=torch.float32)  # noqa: E731 (a row of a table)
    return {
        "unet": lambda: load_denoiser(config, dtype=torch.float32),
        "vae": lambda: load_vae(config),
        "text_encoder": text,
        "text_encoder_2": text,
        "tokenizer": text,
        "scheduler": lambda: read_noise_schedule(config),
    }


def _weights_of(part: str) -> Prepare:
    def prepare(folder: Path) -> Prepared:
        model = _model(folder)
        return Prepared(sorted((model / part).glob("*.safetensors")), _loads(model)[part])

    return prepare


def _settings_of(part: str) -> Prepare:
    def prepare(folder: Path) -> Prepared:
        model = _model(folder)
        return Prepared(sorted((model / part).glob("*.json")), _loads(model)[part])

    return prepare


def _flow_scheduler(folder: Path) -> Prepared:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ds_dpo.config.diffusion import DiffusionConfig
    from ds_dpo.config.models import ModelConfig
    from ds_dpo.models.training_schedule import training_sampler, training_schedule

    model = _model(folder)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(model / "scheduler")
    config, plain = ModelConfig(pretrained=str(model)), DiffusionConfig()

    def read() -> None:
        training_schedule(config, plain).shift.factor_at((16, 128, 128))
        training_sampler(config, plain)

    return Prepared([model / "scheduler" / "scheduler_config.json"], read)


def _model_index(folder: Path) -> Prepared:
    from ds_dpo.export.pipeline import list_copies

    model = _model(folder)
    return Prepared([model / "model_index.json"], lambda: list_copies(model, replaced="unet", variant=None, vae=None))


def _single_file(folder: Path) -> Prepared:
    import torch
    from tiny_families import tiny_model

    from ds_dpo.config.models import ModelConfig
    from ds_dpo.models.loading import load_denoiser, load_vae
    from ds_dpo.models.weights.files import read_header

    path = tiny_model("sdxl").save_file(folder / "model.safetensors")
    config = ModelConfig(pretrained=str(path))

    def read() -> None:
        read_header.cache_clear()  # a program reads a file once
        load_denoiser(config, dtype=torch.float32)
        load_vae(config)

    return Prepared([path], read)


# ---- configuration ----


def _run_yaml(folder: Path) -> Prepared:
    from ds_dpo.config.load import config_to_yaml, load_config

    path = folder / "run.yaml"
    path.write_text(config_to_yaml(load_config(["--config", "miniature"]).config))
    return Prepared([path], lambda: load_config(["--config", str(path)]))


def _deepspeed_json(folder: Path) -> Prepared:
    from ds_dpo.engine.settings_file import DS_CONFIGS, ignored_options, read_deepspeed_file

    path = folder / "settings.json"
    shutil.copy(DS_CONFIGS / "zero3_offload.json", path)
    return Prepared([path], lambda: list(ignored_options(read_deepspeed_file(path), world_size=2)))


KINDS: dict[str, Prepare] = {
    "manifest": _manifest,
    "zero shards": _shards,
    **{f"weights of {part}": _weights_of(part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")},
    "single file": _single_file,
    **DATA_KINDS,
    **{
        f"settings of {part}": _settings_of(part)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
    },
    "settings of a flow's scheduler": _flow_scheduler,
    "model_index.json": _model_index,
    "run YAML": _run_yaml,
    "DeepSpeed JSON": _deepspeed_json,
    **SCORER_KINDS,
}
