from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.loading import file_weights, load_denoiser
from ds_dpo.models.weights import files as files_module
from ds_dpo.models.weights.files import UNET_STEM, FileWeights, find_weights, locate_pipeline, locate_vae
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


def unet_folder(model: ModelConfig) -> Path:
    return Path(resolve_asset(model.pretrained), "unet")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "2MB"])
def test_whole_and_sharded_weights_of_a_variant_are_the_models_own(
    sdxl: ModelConfig, sdxl_copy: ModelConfig, variant: str | None, shard: str
) -> None:
    unet = load_denoiser(sdxl, dtype=torch.float32)
    torch.nn.init.constant_(unet.conv_in.weight, 1 / 3)  # what fp16 cannot hold
    folder = unet_folder(sdxl_copy)
    (folder / f"{UNET_STEM}.safetensors").unlink()
    unet.save_pretrained(folder, variant=variant, max_shard_size=shard)
    model = sdxl_copy.model_copy(update={"variant": variant})
    weights = file_weights(model)
    assert len(find_weights(folder, UNET_STEM, variant=variant).paths) == (1 if shard == "10GB" else 5)
    assert dict(weights).keys() == unet.state_dict().keys() == dict(unet.named_parameters()).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in unet.state_dict().items())


def test_file_weights_keep_the_dtype_of_the_file(sdxl: ModelConfig) -> None:
    assert {tensor.dtype for tensor in file_weights(sdxl).values()} == {torch.float16}


def test_file_weights_read_a_tensor_only_when_asked(sdxl: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real_open = files_module._open

    class Watched:
        def __init__(self, path: Path) -> None:
            self._file = real_open(path)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self._file.get_tensor(name)
            return tensor

    monkeypatch.setattr(files_module, "_open", Watched)
    weights = file_weights(sdxl)
    assert len(weights) == len(list(weights)) > 100
    assert "conv_in.weight" in weights
    assert read == ["conv_in.weight"] * len(read)
    read.clear()
    assert weights["conv_out.bias"].shape == (4,)
    assert read == ["conv_out.bias"]
    with pytest.raises(KeyError):
        weights["no_such.weight"]


def test_headers_give_the_number_of_parameters(sdxl: ModelConfig) -> None:
    unet = load_denoiser(sdxl, dtype=torch.float32)
    files = find_weights(unet_folder(sdxl), UNET_STEM, variant=None)
    assert files.num_parameters() == sum(parameter.numel() for parameter in unet.parameters())
    assert files.num_bytes() == (unet_folder(sdxl) / f"{UNET_STEM}.safetensors").stat().st_size


def test_a_missing_variant_names_what_is_there(sdxl: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"no diffusion_pytorch_model.fp16.safetensors, .* there is diffusion_pytorch"):
        find_weights(unet_folder(sdxl), UNET_STEM, variant="fp16")


def test_a_pickle_alone_is_refused(sdxl_copy: ModelConfig) -> None:
    folder = unet_folder(sdxl_copy)
    (folder / f"{UNET_STEM}.safetensors").rename(folder / f"{UNET_STEM}.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(diffusion_pytorch_model.bin\).*save_pretrained"):
        load_denoiser(sdxl_copy, dtype=torch.float32)


def test_a_torn_weight_file_is_named(sdxl_copy: ModelConfig) -> None:
    path = unet_folder(sdxl_copy) / f"{UNET_STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.safetensors: cannot be read as safetensors"):
        FileWeights(find_weights(path.parent, UNET_STEM, variant=None))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../../elsewhere.safetensors"}, "must name files in the same folder"),
        ({"a": 3}, "must name files in the same folder"),
        ({}, "must name files in the same folder"),
        ({"a": "shard-00001-of-00002.safetensors"}, "shard-00001-of-00002.safetensors: missing, but"),
    ],
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, weight_map: object, message: str) -> None:
    (tmp_path / f"{UNET_STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message):
        find_weights(tmp_path, UNET_STEM, variant=None)


# ---- where a model is ----


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "~/model", "runs/a/export"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=f"model.pretrained {name}: no such file or folder; .*hub id"):
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
        ModelError, match=r"'owner/name' is not a folder here, .* revision 'main' .*\(ConnectionError\)"
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


def test_a_tensor_that_the_config_needs_and_the_file_lacks_is_an_error(sdxl_copy: ModelConfig) -> None:
    folder = unet_folder(sdxl_copy)
    config = json.loads((folder / "config.json").read_text())
    wider = UNet2DConditionModel.from_config({**config, "transformer_layers_per_block": [1, 2]})
    (folder / "config.json").write_text(json.dumps(dict(wider.config)))
    with pytest.raises(ModelError, match=r"unet: its weights lack \d+ tensors of its config, such as .*blocks\.1"):
        load_denoiser(sdxl_copy, dtype=torch.float32)
