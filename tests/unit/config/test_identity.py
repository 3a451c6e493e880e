"""A run of an earlier version stays the same run."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from ds_dpo.config.identity import compare_identity, compare_saved_identity, fingerprint, fingerprints, identity
from ds_dpo.config.load import config_from_yaml, config_to_yaml, load_config
from ds_dpo.config.run import RunConfig


def load(*options: str) -> RunConfig:
    return load_config(["--config", "miniature", *options]).config


def test_a_field_may_be_given_by_its_earlier_name() -> None:
    for option in ("--model.unet_init", "--model.unet-init", "--model.denoiser_init"):
        assert load(option, "earlier/unet").model.denoiser_init == "earlier/unet"


def test_a_run_saved_under_the_earlier_name_is_the_same_run(tmp_path: Path) -> None:
    config = load("--model.denoiser_init", "earlier/unet")
    document = yaml.safe_load(config_to_yaml(config))
    document["model"]["unet_init"] = document["model"].pop("denoiser_init")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    saved = config_from_yaml(tmp_path / "config.yaml")
    assert saved == config
    assert compare_identity(identity(saved, "bf16"), identity(config, "bf16")) == []


def test_a_renamed_field_counts_in_checkpoints_under_its_first_name() -> None:
    fields = identity(load("--model.denoiser_init", "earlier/unet"), "bf16")
    fields["model.unet_init"] = fields.pop("model.denoiser_init")
    assert fields["model.unet_init"] == "earlier/unet"
    expected = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    assert fingerprint(identity(load("--model.unet_init", "earlier/unet"), "bf16")) == expected


@pytest.mark.parametrize(
    "written", [("~/pairs", "/home/me/model"), ("/home/me/pairs", "~/model"), ("~/pairs", "~/model")]
)
def test_a_path_that_was_once_kept_with_a_tilde_is_the_same_path(
    written: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    fields = identity(load("--data.dataset", "~/pairs", "--model.pretrained", "~/model"), "bf16")
    assert (fields["data.dataset"], fields["model.pretrained"]) == ("/home/me/pairs", "/home/me/model")
    saved = {**fields, "data.dataset": written[0], "model.pretrained": written[1]}
    assert fingerprint(saved) in fingerprints(fields)
    assert compare_saved_identity(saved, fields) == []
    other = {**saved, "data.dataset": "~/others"}
    assert fingerprint(other) not in fingerprints(fields)
    (change,) = compare_saved_identity(other, fields)
    assert (change.name, change.old, change.new) == ("data.dataset", "/home/me/others", "/home/me/pairs")
