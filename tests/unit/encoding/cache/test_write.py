"""Making a cache stores each distinct thing once, leaves a finished cache alone, and refuses what does not fit."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_pair_cache import NUM_IMAGES, NUM_PROMPTS, SomePairs, config, make

from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.encoding.cache import write as write_module
from ds_dpo.encoding.cache.pairs import PairCache
from ds_dpo.encoding.cache.shard_file import read_columns
from ds_dpo.errors import ConfigError, DataError


def test_each_distinct_image_and_prompt_is_stored_once_over_the_whole_set(exact: PairCache) -> None:
    record = exact.record
    assert (record.num_pairs, record.num_images, record.num_prompts) == (11, NUM_IMAGES, NUM_PROMPTS)
    assert exact.pairs[0]["chosen"] == exact.pairs[1]["chosen"]
    assert len({int(exact.pairs[index]["prompt"]) for index in (0, 3, 6, 9)}) == 1
    tables = [read_columns(exact.folder / name, ["prompt"]) for name in record.prompt_shards]
    prompts = pa.concat_tables(tables)["prompt"].to_pylist()
    assert len(prompts) == len(set(prompts)) == NUM_PROMPTS
    assert prompts[0] == ""


def test_a_finished_cache_is_left_as_it_is(exact: PairCache) -> None:
    said: list[str] = []
    record = exact.folder / "cache.json"
    before = record.stat().st_mtime_ns
    make(exact.folder, config("--data.flip", "independent"), said)
    assert record.stat().st_mtime_ns == before
    assert said == [f"{exact.folder} is finished already; nothing is encoded"]
    assert not (exact.folder / "work").exists()


# ---- refusals ----


class StoppedError(Exception):
    pass


def begin_only(out: Path) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "scan_unit", stop)
        with pytest.raises(StoppedError):
            make(out, config("--data.flip", "independent"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begun") / "cache"
    begin_only(out)
    return out


@pytest.mark.parametrize("state", ["finished", "begun"])
@pytest.mark.parametrize(
    ("options", "changes", "named"),
    [
        (["--data.resolution", "64"], {}, "fingerprint.data.resolution: the cache has 32, this command 64"),
        ([], {"dtype": "fp16"}, "images.dtype: the cache has fp32, this command fp16"),
        ([], {"mirrored": False}, "images.mirrored: the cache has True, this command False"),
        ([], {"quantity": "mean"}, "images.quantity: the cache has moments, this command mean"),
        (["--model.vae_dtype", "bf16"], {}, "images.vae_dtype: the cache has fp32, this command bf16"),
    ],
)
def test_another_cache_in_the_folder_is_refused_by_name(
    exact: PairCache, begun: Path, state: str, options: list[str], changes: dict[str, Any], named: str
) -> None:
    out = exact.folder if state == "finished" else begun
    with pytest.raises(ConfigError, match=f"holds a cache that was begun with other settings:\n(.*\n)*  {named}"):
        make(out, config("--data.flip", "independent", *options), **changes)


def test_a_dataset_that_changed_in_between_is_refused(begun: Path) -> None:
    class Changed(SomePairs):
        fingerprint: Mapping[str, str] = {"content": "abd"}

    with pytest.raises(ConfigError, match=r"source\.content: the cache has abc, this command abd"):
        make(begun, config("--data.flip", "independent"), source=Changed())


def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt and is not an unfinished cache; name another folder"):
        make(tmp_path, config())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.txt"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    # 17 images of 8x8 or 8x12 latents with 2 x 4 channels in 4 bytes, and 8 prompts of 16 x 96 and 48 values
    monkeypatch.setattr(write_module.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 80_000))
    with pytest.raises(DataError, match=r"0\.00 GB are free, and 0\.00 GB are needed; .*--store mean"):
        make(tmp_path / "cache", config())
    assert list((tmp_path / "cache/images").iterdir()) == []
    monkeypatch.setattr(write_module.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 110_000))
    cache = make(tmp_path / "cache", config())
    written = sum(cache.record.files[name].size for name in (*cache.record.image_shards, *cache.record.prompt_shards))
    assert written > 80_000


class UnreadablePairs(SomePairs):
    """11 pairs of which none can be read."""

    def read(self, index: int) -> PairRecord:
        raise BadRowError(f"row {index}", "caption: NoneType instead of text")


def test_a_set_of_bad_rows_alone_has_a_cache_that_says_so(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", config(), source=UnreadablePairs())
    assert (cache.record.num_pairs, cache.record.num_bad_pairs, cache.record.num_images) == (11, 11, 0)
    assert str(cache.bad_pair(3)) == "row 3: caption: NoneType instead of text"
