"""Verifying a finished cache: a damaged file and another model are found."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_pair_cache import CPU, PLACE, SomePairs, config, make

from ds_dpo.encoding.cache.pairs import PairCache
from ds_dpo.encoding.cache.unit import load_encoders
from ds_dpo.encoding.cache.verify import verify_files, verify_pairs
from ds_dpo.errors import DataError


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_whole_cache_verifies_and_its_pairs_encode_to_the_same(exact: PairCache) -> None:
    said: list[str] = []
    verify_files(exact, place=PLACE, say=said.append)
    run = config()
    encoders = load_encoders(
        run.model, text_dtype="fp32", images=exact.record.images, images_at_once=None, place=PLACE, device=CPU
    )
    verify_pairs(exact, SomePairs(), encoders, num_pairs=4, say=said.append)
    assert "19 images and 8 prompts are finite" in said[0]
    assert said[1].startswith("4 pairs encoded again")


@pytest.mark.parametrize("name", ["images/00001.arrow", "prompts/00000.arrow", "pairs.npy", "images.npy"])
def test_one_bit_is_found(tmp_path: Path, name: str) -> None:
    cache = make(tmp_path / "cache", config())
    flip_bit(cache.folder / name, cache.record.files[name].size // 2)
    with pytest.raises(DataError, match=rf"{name}: its content differs from the record's SHA-256"):
        verify_files(cache, place=PLACE, say=print)


def test_another_vae_is_found_by_encoding_again(exact: PairCache) -> None:
    run = config()
    encoders = load_encoders(
        run.model, text_dtype="fp32", images=exact.record.images, images_at_once=None, place=PLACE, device=CPU
    )
    another_vae = deepcopy(encoders.vae)  # the tests of this file share the loaded one
    with torch.no_grad():
        another_vae.quant_conv.weight.mul_(1.1)
    with pytest.raises(DataError, match=r"encoded again, images differ by .* more than rounding"):
        verify_pairs(exact, SomePairs(), replace(encoders, vae=another_vae), num_pairs=2, say=print)
