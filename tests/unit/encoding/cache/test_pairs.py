"""Reading a cache that this file writes by hand: 3 pairs in 2 buckets, every value its own number."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from pair_files import config

from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.draws import draw_pair
from ds_dpo.data.stream.loader import open_stream
from ds_dpo.diffusion.noising import Noising
from ds_dpo.encoding.cache import reading as cache_reading
from ds_dpo.encoding.cache.pairs import CachedPairs, open_cache
from ds_dpo.encoding.cache.reading import OpenFiles, RowFile
from ds_dpo.encoding.cache.record import (
    IMAGE_ROW,
    PAIR_ROW,
    PROMPT_ROW,
    RECORD_NAME,
    CacheRecord,
    StoredImages,
    StoredText,
    read_record,
)
from ds_dpo.encoding.cache.shard_file import IMAGE_SCHEMA, PROMPT_SCHEMA, new_shard, read_columns, value_offsets
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.record import write_record_file
from ds_dpo.storage.manifest import hash_file

SHAPES = [(16, 16), (16, 32)]  # of the two buckets; the factor is 8, so latents are 2x2 and 2x4
IMAGES = [0, 0, 0, 1, 1]  # bucket of each image; image 2 is not whole
NUMBER_OF_MIRRORED = 100
BAD = "chosen image: not an image"


def moments(number, bucket):
    """(2C, H, W) with C = 2: the number of the image, and which value it is."""
    height, width = SHAPES[bucket][0] // 8, SHAPES[bucket][1] // 8
    return torch.arange(4 * height * width).view(4, height, width) + 1000.0 * number


def content(values):
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def image_row(number, bucket):
    whole = number != 2
    return {
        "key": bytes(15) + bytes([number]),
        "moments": content(moments(number, bucket)) if whole else None,
        "mirrored": content(moments(number + NUMBER_OF_MIRRORED, bucket)) if whole else None,
        "pixel_height": SHAPES[bucket][0],
        "pixel_width": SHAPES[bucket][1],
        "original_height": 500 + number,
        "original_width": 600 + number,
        "corner_top": number,
        "corner_left": 10 + number,
        "error": None if whole else "not an image",
    }


def prompt_row(number):
    states = torch.full((3, 5), float(number), dtype=torch.bfloat16)
    pooled = torch.full((7,), number + 0.5, dtype=torch.bfloat16)
    prompt = "" if number == 0 else f"prompt {number}"
    return {"key": bytes([number] * 16), "prompt": prompt, "text_states": content(states), "pooled": content(pooled)}


def write_shard(path, schema, rows):
    path.parent.mkdir(exist_ok=True)
    with new_shard(path, schema) as shard:
        for row in rows:
            shard.rows.add(row)


def make_cache(folder, *, bad=(1,), mirrored=True, fingerprint=None):
    """Images 0, 1, 2 lie in the first shard and 3, 4 in the second; pair 1's chosen image is image 2."""
    folder.mkdir()
    shards = [[0, 1, 2], [3, 4]]
    for shard, numbers in enumerate(shards):
        rows = [image_row(number, IMAGES[number]) for number in numbers]
        write_shard(folder / f"images/{shard}.arrow", IMAGE_SCHEMA, rows)
    write_shard(folder / "prompts/0.arrow", PROMPT_SCHEMA, map(prompt_row, range(3)))
    images = np.zeros(5, IMAGE_ROW)
    images["shard"], images["bucket"] = [0, 0, 0, 1, 1], IMAGES
    for column in ("moments", "mirrored"):
        images[column] = np.concatenate([value_offsets(folder / f"images/{shard}.arrow", column) for shard in (0, 1)])
    for name in ("original_height", "original_width", "corner_top", "corner_left"):
        images[name] = [image_row(number, 0)[name] for number in range(5)]
    prompts = np.zeros(3, PROMPT_ROW)
    for column in ("text_states", "pooled"):
        prompts[column] = value_offsets(folder / "prompts/0.arrow", column)
    pairs = np.zeros(3, PAIR_ROW)
    pairs["pair_id"], pairs["bucket"], pairs["bad"] = [-7, 8, 9], [0, 0, 1], -1
    pairs["chosen"], pairs["rejected"], pairs["prompt"] = [0, 2, 4], [1, 0, 3], [1, 2, 2]
    pairs["target_probability"], pairs["weight"] = [1, 1, 0.5], [1, 1, 2]
    pairs["bad"][list(bad)] = range(len(bad))
    for name, table in (("pairs", pairs), ("images", images), ("prompts", prompts)):
        np.save(folder / f"{name}.npy", table)
    schema = pa.schema([("index", pa.int64()), ("uid", pa.string()), ("reason", pa.string())])
    write_shard(folder / "bad_pairs.arrow", schema, [{"index": i, "uid": f"row {i}", "reason": BAD} for i in bad])
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()]
    scaling = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    record = CacheRecord(
        fingerprint=fingerprint or {"vae": "abc", "data.resolution": "16"},
        source_description="pairs of a test",
        source_counts={},
        source_fingerprint={},
        software={},
        num_pairs=3,
        num_bad_pairs=len(bad),
        num_images=5,
        num_bad_images=1,
        num_prompts=3,
        bucket_sizes=[2, 1],
        bucket_shapes=SHAPES,
        images=StoredImages(
            quantity="moments",
            dtype="fp32",
            mirrored=mirrored,
            channels=2,
            factor=8,
            vae_dtype="fp32",
            scaling=scaling,
        ),
        text=StoredText(states_shape=(3, 5), pooled_width=7, dtype="bf16"),
        image_shards=["images/0.arrow", "images/1.arrow"],
        prompt_shards=["prompts/0.arrow"],
        files={name: hash_file(folder / name) for name in files},
    )
    write_record_file(folder / RECORD_NAME, record)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_cache(tmp_path / "cache")


def opened(folder, **fields):
    cache = open_cache(folder, say=lambda line: None)
    return CachedPairs(cache, data=config(**fields), seed=3, noising=Noising.plain(1000))


def test_a_pair_has_its_own_images_prompt_and_numbers(folder):
    samples = opened(folder).read(2, 0)
    assert torch.equal(samples.chosen_moments, moments(4, 1)[None])
    assert torch.equal(samples.rejected_moments, moments(3, 1)[None])
    assert torch.equal(samples.text_states, torch.full((1, 3, 5), 2.0, dtype=torch.bfloat16))
    assert torch.equal(samples.pooled, torch.full((1, 7), 2.5, dtype=torch.bfloat16))
    assert (samples.pair_ids.tolist(), samples.target_probabilities.tolist(), samples.weights.tolist()) == (
        [9],
        [0.5],
        [2],
    )


def test_draws_are_those_of_the_pair_and_visit(folder):
    samples = opened(folder).read(2, 5)
    draws = draw_pair(seed=3, pair_id=9, visit=5, latent_shape=(2, 2, 4), noising=Noising.plain(1000))
    assert samples.timesteps.tolist() == [draws.timestep]
    for name in ("noise", "chosen_posterior_noise", "rejected_posterior_noise"):
        assert torch.equal(getattr(samples, name)[0], getattr(draws, name))


@pytest.mark.parametrize("flip", ["off", "shared", "independent"])
def test_mirrored_images_are_read_where_the_draw_says(folder, flip):
    seen = set()
    for visit in range(20):
        draws = draw_pair(seed=3, pair_id=-7, visit=visit, latent_shape=(2, 2, 2), noising=Noising.plain(1000))
        expected = {
            "off": (False, False),
            "shared": (draws.chosen_flip < 0.5,) * 2,
            "independent": (draws.chosen_flip < 0.5, draws.rejected_flip < 0.5),
        }[flip]
        samples = opened(folder, flip=flip).read(0, visit)
        for number, side, is_mirrored in zip((0, 1), ("chosen", "rejected"), expected, strict=True):
            stored = moments(number + NUMBER_OF_MIRRORED * is_mirrored, 0)
            assert torch.equal(getattr(samples, f"{side}_moments")[0], stored)
        seen.add(expected)
    assert len(seen) == {"off": 1, "shared": 2, "independent": 4}[flip]


def test_a_dropped_prompt_is_the_empty_one(folder):
    samples = opened(folder, prompt_dropout=1.0).read(2, 0)
    assert not samples.text_states.any()
    assert torch.equal(samples.pooled, torch.full((1, 7), 0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize(("told", "chosen"), [("fixed", [16, 32, 0, 0, 16, 32]), ("true", [504, 604, 4, 14, 16, 32])])
def test_sizes_are_told_as_the_run_says(folder, told, chosen):
    assert opened(folder, size_conditioning=told).read(2, 0).chosen_time_ids.tolist() == [chosen]


def test_pairs_of_a_bucket_are_joined_in_their_order(folder):
    pairs = opened(folder)
    joined = pairs.join([pairs.read(2, 0), pairs.read(2, 1)])
    assert joined.chosen_moments.shape == (2, 4, 2, 4)
    assert joined.timesteps.tolist() == [int(pairs.read(2, visit).timesteps) for visit in (0, 1)]


def test_a_pair_that_could_not_be_encoded_raises_what_it_raised_online(folder):
    with pytest.raises(BadRowError) as raised:
        opened(folder).read(1, 0)
    assert (raised.value.bad_row.uid, raised.value.bad_row.reason) == ("row 1", BAD)


def test_the_loader_replaces_such_a_pair_and_yields_the_others(folder):
    said = []
    stream = open_stream(
        opened(folder, max_bad_rows=100),
        data=config(max_bad_rows=100),
        seed=3,
        pairs_per_step=1,
        micro_batch_pairs=1,
        rank=0,
        world_size=1,
        pairs_seen=0,
        say=said.append,
    )
    batches = iter(stream)
    ids = {int(next(batches).pair_ids) for _ in range(12)}
    assert ids == {-7, 9}
    assert said
    assert all(line == f"bad row replaced: row 1: {BAD}" for line in said)


# ---- refusals ----


def test_a_cache_that_fits_is_taken(folder):
    open_cache(folder, say=print).require_fits({"vae": "abc", "data.resolution": "16"}, data=config(flip="shared"))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"vae": "abd", "data.resolution": "16"}, "vae: the cache has abc, this run abd"),
        ({"vae": "abc", "data.resolution": "32"}, "data.resolution: the cache has 16, this run 32"),
        ({"vae": "abc"}, r"data.resolution: the cache has 16, this run \(nothing\)"),
        ({"vae": "abc", "data.resolution": "16", "crop": "x"}, r"crop: the cache has \(nothing\), this run x"),
    ],
)
def test_a_stale_cache_is_refused_naming_field_and_values(folder, wanted, expected):
    with pytest.raises(ConfigError, match=expected):
        open_cache(folder, say=print).require_fits(wanted, data=config())


def test_every_difference_is_named_at_once(folder):
    with pytest.raises(ConfigError, match=r"vae: the cache has abc, this run x\n.*data\.resolution: the cache has 16"):
        open_cache(folder, say=print).require_fits({"vae": "x", "data.resolution": "8"}, data=config())


def test_flips_are_refused_where_no_mirrored_images_are_stored(tmp_path):
    folder = make_cache(tmp_path / "cache", mirrored=False)
    with pytest.raises(
        ConfigError, match=r"data\.flip: shared needs mirrored images.*--flips stores them.*off fits this cache"
    ):
        open_cache(folder, say=print).require_fits({"vae": "abc", "data.resolution": "16"}, data=config(flip="shared"))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "images/1.arrow"), "images/1.arrow: .* bytes, the cache's record says"),
        (lambda folder: (folder / "prompts/0.arrow").unlink(), "prompts/0.arrow: missing"),
        (lambda folder: (folder / "cache.json").unlink(), "has no cache.json, so it is not a cache"),
        (lambda folder: (folder / "cache.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "cache.json").write_text('{"format": 1}'), "not the record of a cache"),
        (lambda folder: (folder / "cache.json").write_text('{"format": 99}'), "format 99, this version reads 1"),
        (lambda folder: (folder / "cache.json").write_text("[]"), "format None"),
    ],
)
def test_a_damaged_cache_is_refused_when_it_is_opened(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_cache(folder, say=print)


def test_an_unfinished_cache_says_what_finishes_it(folder):
    (folder / "cache.json").unlink()
    (folder / "work").mkdir()
    with pytest.raises(DataError, match=r"was not finished: run scripts/cache\.py again"):
        read_record(folder)


def test_a_record_naming_files_outside_of_the_cache_is_refused(folder):
    path = folder / "cache.json"
    record = json.loads(path.read_text())
    record["image_shards"][0] = "../../secret"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="not the record of a cache"):
        open_cache(folder, say=print)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(folder):
    pairs = opened(folder)
    os.truncate(folder / "images/1.arrow", 100)
    with pytest.raises(DataError, match=r"images/1\.arrow: ends before byte .*; it was cut short"):
        pairs.read(2, 0)


# ---- files ----


def test_only_so_many_files_are_open_and_an_older_one_opens_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_reading, "MAX_OPEN_FILES", 2)
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number] * 4))
    files = OpenFiles(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in (0, 1, 2, 3, 4, 0, 1):
        assert files.tensor(str(number), 2, shape=(2,), dtype=torch.uint8).tolist() == [number] * 2
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_rows_of_another_kind_are_refused(tmp_path):
    np.save(tmp_path / "pairs.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"pairs\.npy: holds float64 in \(3,\), not rows of"):
        RowFile(OpenFiles(tmp_path), tmp_path, "pairs.npy", PAIR_ROW)


def test_a_row_beyond_the_last_is_refused(folder):
    with pytest.raises(DataError, match=r"pairs\.npy: there is no row 3, it has 3"):
        opened(folder).read(3, 0)


def test_shards_open_with_datasets_too(folder, tmp_path):
    files = str(folder / "images/*.arrow")
    table = load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "elsewhere"))
    assert len(table) == 5
    assert table[3]["moments"] == content(moments(3, 1))


def test_an_empty_shard_is_a_shard(tmp_path):
    write_shard(tmp_path / "s/0.arrow", IMAGE_SCHEMA, [])
    assert len(read_columns(tmp_path / "s/0.arrow", ["key"])) == 0
    assert len(value_offsets(tmp_path / "s/0.arrow", "moments")) == 0


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "0.arrow"

    def rows():
        yield image_row(0, 0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_shard(path, IMAGE_SCHEMA, rows())
    assert list(tmp_path.iterdir()) == []


def test_a_shard_s_checksum_is_that_of_its_file(tmp_path):
    path = tmp_path / "0.arrow"
    with new_shard(path, IMAGE_SCHEMA) as shard:
        shard.rows.add(image_row(0, 0))
    assert shard.entry == hash_file(path)
