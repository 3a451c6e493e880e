"""A run belongs to the files of its models: a changed one is named before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import read_environment
from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.models.contents import read_contents
from ds_dpo.models.weights.hub import commit_of
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.training.belonging import require_same_models

SETTINGS = {"zero_optimization": {"stage": 2}}
MINIATURE = Path(resolve_asset(load_config(["--config", "miniature"]).config.model.pretrained))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(MINIATURE, tmp_path / "model", copy_function=shutil.copyfile))


def configured(model: Path, *options: str) -> RunConfig:
    return load_config(["--config", "miniature", "--model.pretrained", str(model), *options]).config


def started(folder: RunFolder, config: RunConfig, **commits: str) -> None:
    found = read_contents(config.model, with_encoders=True)
    models = {"hashes": found.hashes, "commits": {f"model.{name}": value for name, value in commits.items()}}
    folder.write_start(config, SETTINGS, world_size=1, data={}, models=models)


def check(folder: RunFolder, config: RunConfig, *, with_encoders: bool = True) -> None:
    require_same_models(config, folder, read_environment({}), with_encoders=with_encoders)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_setting(name: str, value: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), name: value})) and None


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "denoiser": ("unet/diffusion_pytorch_model.safetensors", flip_last_bit),
    "vae": ("vae/diffusion_pytorch_model.safetensors", flip_last_bit),
    "text_encoder": ("text_encoder/model.safetensors", flip_last_bit),
    "text_encoder_2": ("text_encoder_2/config.json", change_setting("hidden_act", "relu")),
    "tokenizer_2": ("tokenizer_2/tokenizer_config.json", change_setting("model_max_length", 9)),
    "scheduler": ("scheduler/scheduler_config.json", change_setting("beta_end", 0.5)),
}


@pytest.mark.parametrize("component", CHANGES)
def test_a_changed_file_is_named(model: Path, tmp_path: Path, component: str) -> None:
    folder, config = RunFolder(tmp_path / "run"), configured(model)
    check(folder, config)  # a new run is anyone's
    started(folder, config)
    check(folder, config)
    name, change = CHANGES[component]
    change(model / name)
    with pytest.raises(ModelError) as refused:
        check(folder, config)
    said = str(refused.value)
    assert f"model.pretrained {model} has another {component} (SHA-256 " in said
    assert said.count("SHA-256") == 1
    assert "restore the files, or give another output_dir" in said


def test_what_a_start_does_not_use_is_not_looked_at(model: Path, tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "run"), configured(model)
    started(folder, config)
    for name in (".DS_Store", "README.md"):
        (model / "tokenizer" / name).write_text("not read by a tokenizer")
    check(folder, config)
    shutil.rmtree(model / "text_encoder")
    check(folder, config, with_encoders=False)


def test_a_librarys_version_in_a_configuration_is_no_change(model: Path, tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "run"), configured(model)
    started(folder, config)
    change_setting("_diffusers_version", "9.9")(model / "unet" / "config.json")
    check(folder, config)


def test_another_vae_and_another_start_are_named_by_their_fields(model: Path, tmp_path: Path) -> None:
    vae, unet = shutil.copytree(model / "vae", tmp_path / "vae"), shutil.copytree(model / "unet", tmp_path / "unet")
    config = configured(model, "--model.vae", str(vae), "--model.denoiser_init", str(unet))
    folder = RunFolder(tmp_path / "run")
    started(folder, config)
    flip_last_bit(model / "unet" / "diffusion_pytorch_model.safetensors")
    check(folder, config)  # its weights are not used
    for place in (vae, unet):
        flip_last_bit(place / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=f"model.denoiser_init {unet} has another denoiser .*; model.vae {vae} has an"):
        check(folder, config)


OLD, NEW = 40 * "a", 40 * "b"


def test_a_branch_that_moved_is_named_with_the_commit_that_goes_on(model: Path, tmp_path: Path) -> None:
    places = {commit: tmp_path / "models--owner--name" / "snapshots" / commit for commit in (OLD, NEW)}
    for place in places.values():
        shutil.copytree(model, place)
        assert commit_of(place / "unet") == place.name
    assert commit_of(model) is None
    folder, config = RunFolder(tmp_path / "run"), configured(places[OLD])
    started(folder, config, pretrained=OLD)
    flip_last_bit(places[NEW] / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ModelError, match=rf"its default branch moved from commit {OLD} to {NEW}: --model.revision {OLD} continues"
    ):
        check(folder, configured(places[NEW]))


def test_the_commit_that_a_run_got_anyway_is_the_same_model(model: Path, tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "run"), configured(model)
    started(folder, config, pretrained=OLD)
    pinned = configured(model, "--model.revision", OLD)
    assert folder.accepted_changes(pinned) == ["model.revision"]
    assert folder.require_same_run(pinned, precision="fp32") == [
        f"changed since the last start: model.revision None -> {OLD!r}"
    ]
    other = configured(model, "--model.revision", NEW)
    assert folder.accepted_changes(other) == []
    with pytest.raises(ConfigError, match=f"model.revision: None -> {NEW}"):
        folder.require_same_run(other, precision="fp32")
