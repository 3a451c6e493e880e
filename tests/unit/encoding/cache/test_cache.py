"""Making a cache in this process, and training's view of it beside online encoding."""

from __future__ import annotations

import io
import json
import os
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.data.stream.prepare import OnlinePairs
from ds_dpo.diffusion.noising import Noising, noising_of
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.cache import write as write_module
from ds_dpo.encoding.cache.fingerprint import fingerprint_of, remembered_sha256
from ds_dpo.encoding.cache.pairs import CachedPairs, PairCache
from ds_dpo.encoding.cache.plan import Request
from ds_dpo.encoding.cache.scan import find_distinct, key_of_image
from ds_dpo.encoding.cache.shard_file import read_columns
from ds_dpo.encoding.cache.unit import load_encoders
from ds_dpo.encoding.cache.verify import verify_files, verify_pairs
from ds_dpo.encoding.cache.write import PairCacheMaking
from ds_dpo.encoding.encoder import CachedEncoder, OnlineEncoder
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.make import make as make_folder
from ds_dpo.models import loading
from ds_dpo.models.families.sdxl import sdxl_extras
from ds_dpo.models.loading import latent_shape, load_text, load_vae
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.precision import torch_dtype

PLACE = read_environment({})
CPU = torch.device("cpu")
# wide and tall images, so that cropping has something to do and mirrored crops differ
SIZES = ((40, 52), (64, 48), (37, 90), (80, 80))


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number % len(SIZES)], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class SomePairs:
    """11 pairs in two buckets of 32x32 and 32x48.

    Pairs 0 and 1 share an image and all of 0, 3, 6, 9 their prompt. Pair 4 is unreadable, 5 has a torn image and shares
    it with 7. Files lie in the order of the indices turned round.
    """

    description = "pairs of a test"
    counts: Mapping[str, int] = {"rows": 11, "pairs": 11}
    fingerprint: Mapping[str, str] = {"content": "abc"}
    bucket_sizes: Sequence[int] = (7, 4)
    bucket_shapes: Sequence[tuple[int, int]] = ((32, 32), (32, 48))

    def __len__(self) -> int:
        return 11

    def file_order(self) -> NDArray[np.int64]:
        return np.arange(11)[::-1].copy()

    def read(self, index: int) -> PairRecord:
        uid = f"row {index}"
        if index == 4:
            raise BadRowError(uid, "caption: NoneType instead of text")
        chosen, rejected = picture(2 * index), picture(2 * index + 1)
        if index == 1:
            chosen = picture(0)
        if index in (5, 7):
            rejected = picture(99)[:200]
        return PairRecord(
            prompt="a red circle" if index % 3 == 0 else f"a blue square {index}",
            chosen=chosen,
            rejected=rejected,
            pair_id=id_of(uid),
            uid=uid,
            target_probability=1.0 if index % 2 else 0.5,
            weight=1.0 + index,
        )


# 20 readable images, less the shared one of pairs 0 and 1; the torn one counts in each bucket
NUM_IMAGES = 20 - 1
NUM_BAD_IMAGES = 2
NUM_PROMPTS = 1 + 1 + 6  # '', that of pairs 0, 3, 6, 9, and those of 1, 2, 5, 7, 8, 10


def config(*options: str) -> RunConfig:
    return load_config(["--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu", *options]).config


def request(out: Path, run: RunConfig, **changes: Any) -> Request:
    asked = Request(
        config=run,
        text_dtype="fp32",
        out=out,
        quantity="moments",
        dtype="fp32",
        mirrored=run.data.flip != "off",
        shard_pairs=3,
        images_at_once=None,
    )
    return replace(asked, **changes)


def make(out: Path, run: RunConfig, said: list[str] | None = None, source: Any = None, **changes: Any) -> PairCache:
    making = PairCacheMaking(
        request=request(out, run, **changes),
        source=SomePairs() if source is None else source,
        fingerprint=fingerprint_of(run, text_dtype="fp32"),
        place=PLACE,
        device=CPU,
        say=[].append if said is None else said.append,
    )
    make_folder(making)
    return PairCache(out)


@pytest.fixture(scope="module", autouse=True)
def _models_are_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_dpo.encoding.cache.unit.load_vae", cache_of_function(load_vae))
        patch.setattr("ds_dpo.encoding.cache.unit.load_text", cache_of_function(load_text))
        yield


def cache_of_function(function: Any) -> Any:
    found: dict[str, Any] = {}

    def load(model: Any, **options: Any) -> Any:
        key = f"{model}{options}"
        if key not in found:
            found[key] = function(model, **options)
        return found[key]

    return load


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> PairCache:
    return make(tmp_path_factory.mktemp("exact") / "cache", config("--data.flip", "independent"))


def online(run: RunConfig) -> tuple[OnlinePairs, OnlineEncoder]:
    pairs = OnlinePairs(
        SomePairs(),
        data=run.data,
        seed=run.seed,
        latent_shape=lambda size: latent_shape(run.model, size),
        noising=noising_of(run.diffusion, training_schedule(run.model, run.diffusion)),
    )
    encoder = OnlineEncoder(
        vae=load_vae(run.model), text=load_text(run.model, dtype=torch.float32), extras=sdxl_extras, device="cpu"
    )
    return pairs, encoder


def cached(cache: PairCache, run: RunConfig) -> tuple[CachedPairs, CachedEncoder]:
    images = cache.record.images
    encoder = CachedEncoder(
        quantity=images.quantity,
        vae_dtype=torch_dtype(images.vae_dtype),
        vae_config=images.scaling,
        extras=sdxl_extras,
        device="cpu",
    )
    noising = noising_of(run.diffusion, training_schedule(run.model, run.diffusion))
    return CachedPairs(cache, data=run.data, seed=run.seed, noising=noising), encoder


GOOD_OF_BUCKETS = ([0, 1, 2, 3, 6], [8, 9, 10])


def batches(reader: Any, encoder: Any) -> list[PreferenceBatch]:
    return [
        encoder(reader.join([reader.read(index, visit) for index in indices]))
        for visit in (0, 1)
        for indices in GOOD_OF_BUCKETS
    ]


def assert_equal_batches(
    found: list[PreferenceBatch], expected: list[PreferenceBatch], *, latents: float = 1e-5, rtol: float = 1e-5
) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        for field in fields(PreferenceBatch):
            atol = latents if field.name == "latents" else 1e-5
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            torch.testing.assert_close(
                mine, theirs, atol=atol, rtol=rtol, msg=lambda text, f=field: f"{f.name}: {text}"
            )


# ---- the same batches ----


@pytest.mark.parametrize("flip", ["off", "shared", "independent"])
def test_a_cache_gives_the_batches_of_online_encoding(exact: PairCache, flip: str) -> None:
    run = config("--data.flip", flip, "--data.size_conditioning", "true", "--data.prompt_dropout", "0.4")
    assert_equal_batches(batches(*cached(exact, run)), batches(*online(run)))


def test_a_cache_gives_the_timesteps_and_noise_of_online_encoding(exact: PairCache) -> None:
    sampling = ("--diffusion.timestep_sampling", "logit_normal", "--diffusion.logit_mean", "1")
    noise = ("--diffusion.logit_std", "0.5", "--noise_offset", "0.1", "--input_perturbation", "0.2")
    run = config(*sampling, *noise)
    found = batches(*cached(exact, run))
    assert_equal_batches(found, batches(*online(run)))
    plain = batches(*online(config()))
    assert all(batch.input_noise is None for batch in plain)
    for one, other in zip(found, plain, strict=True):
        assert not torch.equal(one.timesteps, other.timesteps)
        assert not torch.equal(one.noise, other.noise)
        assert one.input_noise is not None
        assert not torch.equal(one.input_noise, one.noise)


def test_that_test_sees_mirrored_and_unmirrored_images_and_dropped_prompts(exact: PairCache) -> None:
    plain = batches(*online(config()))
    changed = batches(*online(config("--data.flip", "independent", "--data.prompt_dropout", "0.4")))
    is_mirrored = torch.cat([(a.latents != b.latents).flatten(1).any(1) for a, b in zip(plain, changed, strict=True)])
    is_dropped = torch.cat(
        [(a.text_states != b.text_states).flatten(1).any(1) for a, b in zip(plain, changed, strict=True)]
    )
    assert is_mirrored.any()
    assert not is_mirrored.all()
    assert is_dropped.any()
    assert not is_dropped.all()


def test_a_half_precision_vae_s_moments_are_kept_exactly(tmp_path: Path) -> None:
    run = config("--model.vae_dtype", "bf16")
    cache = make(tmp_path / "cache", run, dtype="bf16")
    # the CPU's bf16 kernels may round an image otherwise when others pass beside it: one last place is 2**-8
    assert_equal_batches(batches(*cached(cache, run)), batches(*online(run)), latents=0.05, rtol=0.02)


def test_fp16_rounds_what_is_stored_and_no_more(tmp_path: Path, exact: PairCache) -> None:
    run = config()
    cache = make(tmp_path / "cache", run, dtype="fp16")
    rows = range(len(exact.images))
    whole = [row for row in rows if exact.images[row]["moments"] >= 0]
    assert len(whole) == NUM_IMAGES - NUM_BAD_IMAGES
    for row in whole:
        stored = cache.image(cache.images[row], is_mirrored=False)
        assert stored.dtype == torch.float16
        # fp16 keeps 11 bits; 1e-5: mirrored images passed beside the exact ones
        torch.testing.assert_close(
            stored.float(), exact.image(exact.images[row], is_mirrored=False), rtol=2**-11, atol=1e-5
        )
    largest = max(exact.image(exact.images[row], is_mirrored=False).abs().max().item() for row in whole)
    assert_equal_batches(batches(*cached(cache, run)), batches(*online(run)), latents=largest / 1024)


def test_means_alone_are_half_as_large_and_draw_nothing(tmp_path: Path, exact: PairCache) -> None:
    run = config()
    cache = make(tmp_path / "cache", run, quantity="mean")
    found, expected = batches(*cached(cache, run)), batches(*online(run))
    sampled = batches(*cached(exact, run))
    for one, other, drawn in zip(found, expected, sampled, strict=True):
        assert one.latents.shape == other.latents.shape
        assert torch.equal(one.noise, other.noise)
        assert not torch.equal(one.latents, drawn.latents)
    mean = exact.image(exact.images[0], is_mirrored=False)[:4]
    assert torch.equal(cache.image(cache.images[0], is_mirrored=False), mean)


# ---- each distinct thing once ----


def test_each_distinct_image_and_prompt_is_stored_once_over_the_whole_set(exact: PairCache) -> None:
    record = exact.record
    assert (record.num_pairs, record.num_images, record.num_prompts) == (11, NUM_IMAGES, NUM_PROMPTS)
    assert exact.pairs[0]["chosen"] == exact.pairs[1]["chosen"]
    assert len({int(exact.pairs[index]["prompt"]) for index in (0, 3, 6, 9)}) == 1
    tables = [read_columns(exact.folder / name, ["prompt"]) for name in record.prompt_shards]
    prompts = pa.concat_tables(tables)["prompt"].to_pylist()
    assert len(prompts) == len(set(prompts)) == NUM_PROMPTS
    assert prompts[0] == ""


def test_pairs_that_cannot_be_read_raise_as_they_do_online(exact: PairCache) -> None:
    assert (exact.record.num_bad_pairs, exact.record.num_bad_images) == (3, NUM_BAD_IMAGES)
    run = config()
    (reader, _), (expected, _) = cached(exact, run), online(run)
    for index in (4, 5, 7):
        with pytest.raises(BadRowError) as of_cache:
            reader.read(index, 0)
        with pytest.raises(BadRowError) as of_source:
            expected.read(index, 0)
        assert of_cache.value.bad_row == of_source.value.bad_row


def test_equal_files_of_another_shape_or_other_pixels_are_other_images() -> None:
    image = Image.open(io.BytesIO(picture(0)))
    turned = image.copy()
    turned.getexif()[0x112] = 6
    palette = image.convert("P")
    raws = [picture(0), picture(1), image, turned, palette]
    keys = {key_of_image(raw, shape, otherwise="") for raw in raws for shape in ((32, 32), (32, 48))}
    assert len(keys) == 2 * len(raws)
    assert key_of_image({"bytes": picture(0), "path": "x"}, (32, 32), otherwise="") == key_of_image(
        picture(0), (32, 32), otherwise=""
    )
    assert key_of_image(None, (32, 32), otherwise="1") != key_of_image(None, (32, 32), otherwise="2")


def test_distinct_things_are_numbered_as_they_are_first_met() -> None:
    found = find_distinct(pa.array([b"b", None, b"a", b"b", b"\0", b"c", b"a"], pa.binary()))
    assert found.row_of.tolist() == [0, -1, 1, 0, 2, 3, 1]
    assert found.first.tolist() == [0, 2, 4, 5]
    assert found.keys.to_pylist() == [b"b", b"a", b"\0", b"c"]
    assert found.rows_between(1, 5) == range(1, 3)


# ---- going on, and refusing ----


def test_a_finished_cache_is_left_as_it_is(exact: PairCache) -> None:
    said: list[str] = []
    record = exact.folder / "cache.json"
    before = record.stat().st_mtime_ns
    make(exact.folder, config("--data.flip", "independent"), said)
    assert record.stat().st_mtime_ns == before
    assert said == [f"{exact.folder} is finished already; nothing is encoded"]
    assert not (exact.folder / "work").exists()


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


class StoppedError(Exception):
    pass


def begin_only(out: Path) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "scan_unit", stop)
        with pytest.raises(StoppedError):
            make(out, config("--data.flip", "independent"))


def test_a_dataset_that_changed_in_between_is_refused(begun: Path) -> None:
    class Changed(SomePairs):
        fingerprint: Mapping[str, str] = {"content": "abd"}

    with pytest.raises(ConfigError, match=r"source\.content: the cache has abc, this command abd"):
        make(begun, config("--data.flip", "independent"), source=Changed())


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


def test_random_crops_do_not_fit_a_cache() -> None:
    with pytest.raises(ConfigError, match=r"data\.crop random does not fit a cache"):
        fingerprint_of(config("--data.crop", "random"), text_dtype="fp32")


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


# ---- fingerprint ----


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


def test_a_file_is_hashed_again_only_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    # SHA-256 of abc: FIPS 180-2, appendix B.1
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert remembered_sha256(file) == of_abc
    (note,) = (tmp_path / "home/ds_dpo/sha256").iterdir()
    note.write_text("0" * 64)
    assert remembered_sha256(file) == "0" * 64
    os.utime(file, ns=(1, 1))
    assert remembered_sha256(file) == of_abc
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # cannot be written
    assert remembered_sha256(file) == of_abc


# ---- verification ----


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
    with torch.no_grad():
        encoders.vae.quant_conv.weight.mul_(1.1)
    with pytest.raises(DataError, match=r"encoded again, images differ by .* more than rounding"):
        verify_pairs(exact, SomePairs(), encoders, num_pairs=2, say=print)
