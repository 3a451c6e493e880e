"""What the reference's errors depend on: a cache that differs in any of it is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_pairs import NumberedPairs, make
from tiny_flux1 import save_tiny_flux1

from ds_dpo.config.load import load_config
from ds_dpo.encoding.feed import PairFeed
from ds_dpo.errors import ConfigError
from ds_dpo.models.denoiser.attention import AttentionChoice
from ds_dpo.reference.cache import fingerprint as fingerprint_module
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, fingerprint_of, start_of_policy

OPTIONS = ["--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu"]
START = StartOfPolicy(weights="w", config="c", attention="sdpa")


def parts_of(*options: str, start: StartOfPolicy = START, precision: Any = "fp32", **of_feed: Any) -> dict[str, str]:
    feed = PairFeed(
        pairs=NumberedPairs((11,)),
        description="",
        counts={},
        fingerprint={"content": "abc"},
        encoding="as they come",
        cache=None,
        name_pair=str,
    )
    return fingerprint_of(
        load_config([*OPTIONS, *options]).config, replace(feed, **of_feed), start, precision=precision
    )


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"options": ["--seed", "1"]}, {"seed"}),
        ({"options": ["--data.flip", "shared"]}, {"data.flip"}),
        ({"options": ["--data.crop", "random"]}, {"data.crop"}),
        ({"options": ["--data.prompt_dropout", "0.1"]}, {"data.prompt_dropout"}),
        ({"options": ["--data.size_conditioning", "true"]}, {"data.size_conditioning"}),
        ({"options": ["--data.max_rows", "9"]}, {"data.max_rows"}),
        ({"options": ["--model.vae_dtype", "bf16"]}, {"model.vae_dtype"}),
        ({"options": ["--model.prediction_type", "v_prediction"]}, {"prediction_type"}),
        ({"options": ["--diffusion.min_timestep", "5"]}, {"diffusion.min_timestep"}),
        ({"options": ["--diffusion.noise_offset", "0.1"]}, {"diffusion.noise_offset"}),
        ({"options": ["--diffusion.input_perturbation", "0.1"]}, {"diffusion.input_perturbation"}),
        (
            {"options": ["--diffusion.zero_terminal_snr", "true", "--model.prediction_type", "v_prediction"]},
            {"diffusion.zero_terminal_snr", "noise_schedule", "prediction_type"},
        ),
        ({"start": replace(START, weights="x")}, {"unet.weights"}),
        ({"start": replace(START, config="x")}, {"unet.config"}),
        ({"start": replace(START, attention="xformers")}, {"attention kernels"}),
        ({"precision": "bf16"}, {"precision", "text_dtype"}),
        ({"fingerprint": {"content": "xyz"}}, {"pairs.content"}),
        ({"pairs": NumberedPairs((7, 4))}, {"pairs.number"}),
        # what acts on errors that are there already, or on nothing
        ({"options": ["--diffusion.error_weighting", "min_snr", "--diffusion.snr_gamma", "5"]}, set()),
        ({"options": ["--beta", "2000", "--learning_rate", "1e-6", "--pairs_per_step", "8"]}, set()),
        ({"options": ["--micro_batch_pairs", "2", "--model.attention", "auto", "--data.workers", "3"]}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)) or "nothing" if isinstance(value, set) else "",
)
def test_a_stale_cache_is_refused_naming_what_differs(tmp_path: Path, changes: Any, names: set[str]) -> None:
    options = changes.pop("options", [])
    was, now = parts_of(), parts_of(*options, **changes)
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=1, fingerprint=was)
    if not names:
        errors.require_fits(now)
        return
    with pytest.raises(ConfigError) as caught:
        errors.require_fits(now)
    lines = str(caught.value).splitlines()[1:-1]
    assert {line.partition(":")[0].strip() for line in lines} == names
    for name in names:
        assert f"{name}: the cache has {was.get(name)}, this run {now.get(name)}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"encoding": "moments of a cache in fp16"},
            "encoding: the cache has images that are encoded when they are read, this run images from data.cache "
            "(moments in fp16)",
        ),
        ({"options": ["--held_out.share", "0.1"]}, "held_out.share: the cache has (nothing), this run 0.1"),
    ],
)
def test_a_difference_is_said_in_words(tmp_path: Path, changes: Any, line: str) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=1, fingerprint=parts_of())
    with pytest.raises(ConfigError) as caught:
        errors.require_fits(parts_of(*changes.pop("options", []), **changes))
    assert [each.strip() for each in str(caught.value).splitlines()[1:-1]] == [line]


def test_every_field_that_acts_on_errors_is_among_the_parts(tmp_path: Path) -> None:
    from ds_dpo.config.fields import FIELDS

    acting = {
        spec.path
        for spec in FIELDS.values()
        if spec.is_identity
        and spec.section in ("data", "diffusion")
        and spec.path.split(".")[1] not in fingerprint_module.ACT_ON_COMPARING
    }
    # left out while they have no effect, as caches of earlier versions lack them
    of_flows = {"diffusion.mode_scale", "diffusion.timestep_shift", "diffusion.shift"}
    assert acting - parts_of().keys() == {"data.files", "data.labels"} | of_flows
    assert "data.files" in parts_of("--data.files", "train*.parquet")
    (tmp_path / "labels.parquet").write_bytes(b"abc")
    # by content, so that the file may move: sha256 of abc, FIPS 180-2, appendix B.1
    found = parts_of("--data.labels", str(tmp_path / "labels.parquet"))["data.labels"]
    assert found == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_one_changed_weight_is_another_start(small_unet: Any) -> None:
    choice = AttentionChoice(name="sdpa", sentence="")
    before = start_of_policy(small_unet, choice)
    assert start_of_policy(small_unet, choice) == before
    with torch.no_grad():
        small_unet.conv_in.bias[0] += 1e-3
    after = start_of_policy(small_unet, choice)
    assert after.weights != before.weights
    assert after.config == before.config


@pytest.fixture
def small_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
    )


def test_guidance_that_a_denoiser_is_given_counts(tmp_path: Path) -> None:
    """The default counts as its value, and a denoiser that takes none has no such part."""
    dev, schnell = (str(save_tiny_flux1(tmp_path / shape, shape)) for shape in ("dev", "schnell"))
    flux = ("--model.family", "flux1", "--model.pretrained")
    unset, one, two = (parts_of(*flux, dev, *own) for own in ((), ("--model.guidance=1",), ("--model.guidance=2",)))
    assert unset == one
    assert {name for name in one if one[name] != two[name]} == {"model.guidance"}
    assert "model.guidance" not in parts_of(*flux, schnell)
