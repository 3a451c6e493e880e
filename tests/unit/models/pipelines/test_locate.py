from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.pipelines.locate import locate_pipeline, locate_vae
from ds_dpo.models.weights.hub import fetch_folder

# Names as in SDXL's repository, weights in both variants and other formats beside them.
SDXL_REPOSITORY = [
    "model_index.json",
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/model.onnx_data",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_encoder/model.onnx",
]


@pytest.fixture(autouse=True)
def forget_fetched_folders() -> None:
    fetch_folder.cache_clear()


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "~/model", "runs/a/export"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: pytest.fail("asked the hub"))
    with pytest.raises(
        ModelError, match=f"model.pretrained {os.path.expanduser(name)}: no such file or folder; .*hub id"
    ):
        locate_pipeline(ModelConfig(pretrained=name))


def test_a_file_or_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "sdxl.yaml").touch()
    with pytest.raises(ModelError, match=r"sdxl.yaml is not a model file; only .safetensors .*from_single_file"):
        locate_pipeline(ModelConfig(pretrained=str(tmp_path / "sdxl.yaml")))
    with pytest.raises(ModelError, match=r"no model_index.json"):
        locate_pipeline(ModelConfig(pretrained=str(tmp_path)))


def test_an_unreachable_hub_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*names: str, **options: object) -> str:
        raise ConnectionError("name resolution")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ModelError, match=r"'owner/name' is not a folder here, .* revision 'main': ConnectionError: name resol"
    ):
        locate_pipeline(ModelConfig(pretrained="owner/name", revision="main"))


@pytest.mark.parametrize(("variant", "infix", "other"), [(None, "", ".fp16"), ("fp16", ".fp16", "")])
def test_of_a_hub_pipeline_only_what_training_reads_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, variant: str | None, infix: str, other: str
) -> None:
    calls: list[set[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, revision) == ("stabilityai/sdxl", "abc")
        calls.append(
            set(filter_repo_objects(SDXL_REPOSITORY, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        )
        return resolve_asset("ds_dpo://assets/miniature/model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = ModelConfig(pretrained="stabilityai/sdxl", revision="abc", variant=variant)
    assert locate_pipeline(model) == locate_pipeline(model) == Path(resolve_asset("ds_dpo://assets/miniature/model"))
    (chosen,) = calls  # a branch that moves must not give one process two revisions
    for stem in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert f"{stem}{infix}.safetensors" in chosen
        assert f"{stem}{other}.safetensors" not in chosen
    assert {"model_index.json", "tokenizer_2/merges.txt", "scheduler/scheduler_config.json"} <= chosen
    assert not [name for name in chosen if "onnx" in name or name.startswith(("sd_xl", "vae_1_0", "README"))]


def test_a_replaced_vae_may_be_a_folder_a_pipeline_or_absent(sdxl: ModelConfig, tmp_path: Path) -> None:
    pipeline = Path(resolve_asset(sdxl.pretrained))
    for place in (pipeline, pipeline / "vae"):
        assert locate_vae(str(place)) == pipeline / "vae"
    with pytest.raises(ModelError, match=r"neither config.json nor vae/config.json"):
        locate_vae(str(tmp_path))
