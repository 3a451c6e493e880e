"""What a cache's content depends on, and how the files of models are hashed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_pair_cache import config

from ds_dpo.encoding.cache.fingerprint import fingerprint_of
from ds_dpo.errors import ConfigError


def test_random_crops_do_not_fit_a_cache() -> None:
    with pytest.raises(ConfigError, match=r"data\.crop random does not fit a cache"):
        fingerprint_of(config("--data.crop", "random"), text_dtype="fp32")


@pytest.mark.parametrize(
    ("option", "value", "changed"),
    [
        ("data.resolution", "64", {"data.resolution"}),
        ("data.ties", "soft", {"data.ties"}),
        ("data.max_rows", "7", {"data.max_rows"}),
        ("model.vae_dtype", "bf16", {"model.vae_dtype"}),
        ("data.flip", "shared", set()),
        ("data.prompt_dropout", "0.5", set()),
        ("data.size_conditioning", "true", set()),
        ("data.workers", "3", set()),
        ("seed", "5", set()),
        ("objective.beta", "7", set()),
        ("diffusion.noise_offset", "0.1", set()),
        ("diffusion.timestep_sampling", "turbo", set()),
        ("diffusion.zero_terminal_snr", "true", set()),
    ],
)
def test_the_fingerprint_follows_what_the_stored_values_follow(option: str, value: str, changed: set[str]) -> None:
    before = fingerprint_of(config(), text_dtype="fp32")
    after = fingerprint_of(config(f"--{option}", value), text_dtype="fp32")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_share_that_is_held_out_is_a_part_and_none_is_not() -> None:
    without = fingerprint_of(config(), text_dtype="fp32")
    assert fingerprint_of(config("--held_out.share", "0.1"), text_dtype="fp32") == without | {"held_out.share": "0.1"}


def test_the_fingerprint_follows_the_models_content_and_not_its_place(tmp_path: Path) -> None:
    import shutil

    from ds_dpo.config.asset_paths import resolve_asset

    folder = tmp_path / "model"
    shutil.copytree(resolve_asset(config().model.pretrained), folder, copy_function=shutil.copyfile)
    before = fingerprint_of(config(), text_dtype="fp32")
    assert fingerprint_of(config("--model.pretrained", str(folder)), text_dtype="fp32") == before
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    settings = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}))
    after = fingerprint_of(config("--model.pretrained", str(folder)), text_dtype="bf16")
    assert {name for name in before if before[name] != after[name]} == {"vae", "text_encoder_2", "text_dtype"}
