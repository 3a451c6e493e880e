"""Encoding a unit: an image that changed since the scan, or latents that cannot be stored, end the making."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pair_cache import SomePairs, config, make, picture

from ds_dpo.data.source import PairRecord
from ds_dpo.data.stream.prepare import OnlinePairs
from ds_dpo.diffusion.noising import Noising
from ds_dpo.errors import DataError
from ds_dpo.models import loading


def test_an_image_that_changes_between_scan_and_encoding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing(SomePairs):
        reads = 0

        def read(self, index: int) -> PairRecord:
            record = super().read(index)
            if index == 2:
                Changing.reads += 1
                return replace(record, chosen=picture(1000 + Changing.reads))
            return record

    with pytest.raises(DataError, match="row 2: its chosen image is not the one that was scanned"):
        make(tmp_path / "cache", config(), source=Changing())


def test_latents_that_are_not_finite_end_it_naming_their_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_overflow(model: Any) -> Any:
        vae = loading.load_vae(model)
        encode = vae.encode

        def overflowing(pixels: torch.Tensor) -> Any:
            output = encode(pixels)
            if torch.equal(pixels, of_pair_3):
                output.latent_dist.mean[:] = torch.nan
            return output

        vae.encode = overflowing
        return vae

    pair = OnlinePairs(
        SomePairs(), data=config().data, seed=0, latent_shape=lambda size: (4, 8, 8), noising=Noising.plain(1000)
    ).read(3, 0)
    of_pair_3 = pair.chosen_pixels
    monkeypatch.setattr("ds_dpo.encoding.cache.unit.load_vae", with_overflow)
    with pytest.raises(
        DataError, match=r"NaN or infinite latents in torch\.float32; .*fp16-fix.*\n  row 3 \(chosen im"
    ):
        make(tmp_path / "cache", config(), images_at_once=1)


def test_latents_that_the_stored_dtype_cannot_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_large_latents(model: Any) -> Any:
        vae = loading.load_vae(model)
        torch.nn.init.constant_(vae.quant_conv.bias, 1e5)
        return vae

    monkeypatch.setattr("ds_dpo.encoding.cache.unit.load_vae", with_large_latents)
    with pytest.raises(DataError, match=r"too large for --dtype fp16; use bf16 or fp32; the images are:\n  row 10"):
        make(tmp_path / "cache", config(), dtype="fp16")
