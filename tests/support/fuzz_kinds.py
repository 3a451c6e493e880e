"""The kinds of files that tests/fuzz.py damages: for each, small whole files, and the reader that meets them."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.config.asset_paths import resolve_asset


@dataclass(frozen=True)
class Prepared:
    """paths: the files to damage. read: reads them as a program does. Raises DsDpoError."""

    paths: Sequence[Path]
    read: Callable[[], Any]


Prepare = Callable[[Path], Prepared]


def _silent(*_: Any) -> None:
    pass


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


# ---- data ----


def _pairs(dataset: Path, **fields: Any) -> Callable[[], None]:
    from pair_files import config

    from ds_dpo.data.images import decode_rgb
    from ds_dpo.data.reading.open_source import open_source
    from ds_dpo.data.source import BadRowError
    from ds_dpo.errors import DataError

    data = config(dataset, cache_dir=str(dataset.parent / "cache"), **fields)

    def read() -> None:
        shutil.rmtree(dataset.parent / "cache", ignore_errors=True)
        source = open_source(data, say=_silent)
        for index in range(len(source)):
            try:
                record = source.read(index)
                decode_rgb(record.chosen)
                decode_rgb(record.rejected)
            except (BadRowError, DataError):
                continue  # the loader counts it, and takes another

    return read


def _parquet(folder: Path) -> Prepared:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pair_files import row

    dataset = folder / "pairs"
    (dataset / "data").mkdir(parents=True)
    path = dataset / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([row(number, label_1=0.0) for number in range(6)]), path, row_group_size=3)
    return Prepared([path], _pairs(dataset))


def _tar(folder: Path) -> Prepared:
    import io

    from pair_files import file_of, picture

    dataset = folder / "pairs"
    dataset.mkdir()
    with tarfile.open(dataset / "train.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            members = {
                "jpg_0.png": file_of(picture(2 * number)),
                "jpg_1.png": file_of(picture(2 * number + 1)),
                "json": json.dumps({"caption": f"prompt {number} grün", "label_0": 1.0, "label_1": 0.0}).encode(),
            }
            for ending, content in members.items():
                entry = tarfile.TarInfo(f"{number:04}.{ending}")
                entry.size = len(content)
                entry.pax_headers = {"comment": "grün"}
                tar.addfile(entry, io.BytesIO(content))
    return Prepared([dataset / "train.tar"], _pairs(dataset, format="webdataset"))


# ---- configuration ----


def _run_yaml(folder: Path) -> Prepared:
    from ds_dpo.config.load import config_from_yaml, config_to_yaml, load_config

    path = folder / "run.yaml"
    path.write_text(config_to_yaml(load_config(["--config", "miniature"]).config))
    return Prepared([path], lambda: config_from_yaml(path))


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
    "parquet": _parquet,
    "tar": _tar,
    **{
        f"settings of {part}": _settings_of(part)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
    },
    "run YAML": _run_yaml,
    "DeepSpeed JSON": _deepspeed_json,
}
