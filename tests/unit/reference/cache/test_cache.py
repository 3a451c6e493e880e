"""A cache of reference errors over pairs without images: what is computed, found again, missing, extended, refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_dpo.batch import DrawnPairs
from ds_dpo.config.load import load_config
from ds_dpo.data.source import BadRowError
from ds_dpo.data.stream.loader import open_stream
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.data.stream.prepare import join_samples
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.feed import PairFeed
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.make import make as make_folder
from ds_dpo.models.denoiser.attention import AttentionChoice
from ds_dpo.reference.cache import fingerprint as fingerprint_module
from ds_dpo.reference.cache.errors import PairsWithReferenceErrors, ReferenceErrors
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, fingerprint_of, start_of_policy
from ds_dpo.reference.cache.record import Coverage
from ds_dpo.reference.cache.write import ReferenceErrorsMaking

PLACE = read_environment({})
SEED = 3
PAIRS_PER_STEP = 4
LAYOUTS = {"square": (11,), "buckets": (7, 4)}


def errors_by_hand(index: int, visit: int) -> tuple[float, float]:
    return index + visit / 8, index + visit / 8 + 0.5


class NumberedPairs:
    """Pairs that know their index and visit; some are bad."""

    def __init__(self, bucket_sizes: Sequence[int], bad: Sequence[int] = ()) -> None:
        self.bucket_sizes = bucket_sizes
        self.bad = list(bad)

    def read(self, index: int, visit: int) -> DrawnPairs:
        if index in self.bad:
            raise BadRowError(f"row {index}", "torn")
        nothing = torch.zeros(1, 4, 1, 1)
        return DrawnPairs(
            chosen_time_ids=torch.tensor([[float(index)]]),
            rejected_time_ids=torch.tensor([[float(visit)]]),
            timesteps=torch.zeros(1, dtype=torch.int64),
            noise=nothing,
            chosen_posterior_noise=nothing,
            rejected_posterior_noise=nothing,
            pair_ids=torch.tensor([index]),
            target_probabilities=torch.ones(1),
            weights=torch.ones(1),
        )

    def join(self, parts: list[DrawnPairs]) -> DrawnPairs:
        return join_samples(parts)


class Computing:
    """Stands for the UNet: each pair's errors say which pair and visit it is; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __call__(self, samples: DrawnPairs) -> tuple[Tensor, Tensor]:
        places = [(int(index), int(visit)) for index, visit in zip(*self.names(samples), strict=True)]
        self.batches.append(places)
        both = torch.tensor([errors_by_hand(*place) for place in places])
        return both[:, 0], both[:, 1]

    @staticmethod
    def names(samples: DrawnPairs) -> tuple[list[float], list[float]]:
        return samples.chosen_time_ids[:, 0].tolist(), samples.rejected_time_ids[:, 0].tolist()


def make(
    out: Path,
    pairs: NumberedPairs,
    *,
    steps: int | None = None,
    visits: int | None = None,
    said: list[str] | None = None,
    computing: Computing | None = None,
    **changes: Any,
) -> ReferenceErrors:
    sizes = list(pairs.bucket_sizes)
    if visits is None:
        assert steps is not None
        coverage = Coverage.of_run(steps, pairs_per_step=PAIRS_PER_STEP, bucket_sizes=sizes)
    else:
        coverage = Coverage.of_visits(visits, pairs_per_step=PAIRS_PER_STEP, bucket_sizes=sizes)
    making = ReferenceErrorsMaking(
        out=out,
        coverage=coverage,
        seed=SEED,
        pairs=pairs,
        shard_pairs=6,
        batch_pairs=3,
        fingerprint={"unet": "abc"},
        source_description="numbered pairs",
        device_name="cpu",
        workers=0,
        load=lambda: computing or Computing(),
        place=PLACE,
        say=[].append if said is None else said.append,
    )
    make_folder(replace(making, **changes))
    return ReferenceErrors(out)


def trained(pairs: Any, *, steps: int, pairs_per_step: int = PAIRS_PER_STEP, max_bad_rows: int = 100) -> list[Any]:
    """Every sample that a run's loader gives."""
    data = load_config(
        ["--config", "miniature", "--data.workers", "0", "--data.max_bad_rows", str(max_bad_rows)]
    ).config.data
    stream = open_stream(
        pairs,
        data=data,
        seed=SEED,
        pairs_per_step=pairs_per_step,
        micro_batch_pairs=1,
        rank=0,
        world_size=1,
        pairs_seen=0,
        say=lambda line: None,
    )
    batches = iter(stream)
    return [next(batches) for _ in range(steps * pairs_per_step)]


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ---- what is computed is what a run reads ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [[], [1, 8]], ids=["good", "bad"])
@pytest.mark.parametrize("asked", [{"steps": 7}, {"visits": 4}], ids=["steps", "visits"])
def test_a_run_finds_the_errors_of_all_that_it_meets(tmp_path: Path, layout: str, bad: list[int], asked: Any) -> None:
    pairs = NumberedPairs(LAYOUTS[layout], bad)
    cached = PairsWithReferenceErrors(pairs, make(tmp_path / "cache", pairs, **asked))
    found, expected = trained(cached, steps=7), trained(pairs, steps=7)
    assert [sample.pair_ids for sample in found] == [sample.pair_ids for sample in expected], "other pairs than without"
    visits = set()
    for sample in found:
        ((index,), (visit,)) = Computing.names(sample)
        visits.add(visit)
        read = sample.reference_chosen_error.item(), sample.reference_rejected_error.item()
        assert read == errors_by_hand(int(index), int(visit))
        assert sample.reference_chosen_error.dtype == torch.float32
    assert visits >= {0, 1}


def test_only_what_the_run_meets_is_computed_and_each_once(tmp_path: Path) -> None:
    computing, pairs = Computing(), NumberedPairs((11,))
    errors = make(tmp_path / "cache", pairs, steps=4, computing=computing)
    places = [place for batch in computing.batches for place in batch]
    order = PairOrder((11,), pairs_per_step=PAIRS_PER_STEP, seed=SEED)
    assert places == [order.place(position) for position in range(16)], "one epoch of 11 and 5 pairs of the next"
    assert errors.record.num_computed == 16
    assert errors.record.num_visits == 2


def test_pairs_of_a_batch_share_a_bucket_and_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    for asked in ({"steps": 7}, {"visits": 2}):
        found = []
        for workers in (0, 2):
            computing = Computing()
            out = tmp_path / f"{next(iter(asked))}_{workers}"
            make(out, NumberedPairs((7, 4), [1]), computing=computing, workers=workers, **asked)
            found.append(computing.batches)
        assert found[0] == found[1]
        for batch in found[0]:
            assert len({index >= 7 for index, _ in batch}) == 1
            assert len(batch) <= 3


def test_two_numbers_are_stored_of_each_pair_and_visit(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), visits=3)
    header = 128
    assert (errors.folder / errors.record.table).stat().st_size == header + 3 * 11 * 8


# ---- bad pairs ----


def test_a_pair_that_was_bad_is_replaced_as_it_was_then(tmp_path: Path) -> None:
    sick = NumberedPairs((11,), [1, 8])
    errors = make(tmp_path / "cache", sick, steps=7)
    assert 4 <= errors.record.num_bad <= 6, "two pairs in two whole visits and a part of the third"
    healthy = NumberedPairs((11,))
    found = trained(PairsWithReferenceErrors(healthy, errors), steps=7)
    expected = trained(sick, steps=7)
    assert [sample.pair_ids for sample in found] == [sample.pair_ids for sample in expected]
    with pytest.raises(BadRowError, match="pair 8: it could not be read when"):
        errors.read(8, 0)


def met(sizes: Sequence[int], positions: int) -> list[tuple[int, int]]:
    order = PairOrder(sizes, pairs_per_step=PAIRS_PER_STEP, seed=SEED)
    return [order.place(position) for position in range(positions)]


def test_a_stand_in_that_nobody_foresaw_is_an_error_that_says_so(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=4)
    second_visit = {index for index, visit in met((11,), 16) if visit == 1}
    absent = next(index for index in range(11) if index not in second_visit)
    with pytest.raises(DataError, match=f"no reference error of pair {absent} in visit 1") as caught:
        errors.read(absent, 1)
    assert not isinstance(caught.value, BadRowError)
    with pytest.raises(DataError, match="in visit 2"):
        errors.read(0, 2)


def test_errors_that_are_not_finite_end_the_making(tmp_path: Path) -> None:
    def broken(samples: DrawnPairs) -> tuple[Tensor, Tensor]:
        return torch.full((len(samples.pair_ids),), float("nan")), torch.ones(len(samples.pair_ids))

    computing: Any = broken
    with pytest.raises(DataError, match="NaN or infinite"):
        make(tmp_path / "cache", NumberedPairs((11,)), steps=1, computing=computing)
    assert not (tmp_path / "cache" / "reference.json").exists()


# ---- enough for a run ----


def covers(errors: ReferenceErrors, *, steps: int, pairs_per_step: int = PAIRS_PER_STEP) -> None:
    errors.require_covers(max_train_steps=steps, pairs_per_step=pairs_per_step, seed=SEED)


def test_a_longer_run_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=4)
    for steps, pairs_per_step in ((4, 4), (1, 4), (2, 8), (1, 16), (5, 3)):
        covers(errors, steps=steps, pairs_per_step=pairs_per_step)
    with pytest.raises(ConfigError) as caught:
        covers(errors, steps=6)
    for said in ("lacks 8 of the 24", "max_train_steps 6", "--visits 3", "train with max_train_steps 4"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"lacks 2 of the 18.*train with max_train_steps 2"):
        covers(errors, steps=3, pairs_per_step=6)


def test_whole_visits_fit_any_run_that_comes_to_no_more(tmp_path: Path) -> None:
    square = make(tmp_path / "square", NumberedPairs((11,)), visits=2)
    covers(square, steps=5)
    covers(square, steps=2, pairs_per_step=11)
    with pytest.raises(ConfigError, match="lacks 2 of the 24"):
        covers(square, steps=6)
    buckets = make(tmp_path / "buckets", NumberedPairs((7, 4)), visits=2)
    for pairs_per_step in (2, 4, 8):
        met_twice = 0
        while max(visit for _, visit in met_by(pairs_per_step, met_twice + 1)) < 2:
            met_twice += 1
        covers(buckets, steps=met_twice, pairs_per_step=pairs_per_step)
        with pytest.raises(ConfigError, match="lacks"):
            covers(buckets, steps=met_twice + 1, pairs_per_step=pairs_per_step)


def met_by(pairs_per_step: int, steps: int) -> list[tuple[int, int]]:
    order = PairOrder((7, 4), pairs_per_step=pairs_per_step, seed=SEED)
    return [order.place(position) for position in range(steps * pairs_per_step)]


def test_with_buckets_the_steps_of_another_size_are_of_other_pairs(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((7, 4)), steps=4)
    covers(errors, steps=4)
    with pytest.raises(ConfigError, match="lacks 16 of the 16"):
        covers(errors, steps=8, pairs_per_step=2)


@pytest.mark.parametrize("sizes", [(11,), (7, 4), (40, 3, 9)])
@pytest.mark.parametrize("pairs_per_step", [1, 4, 16])
def test_visits_begun_are_those_of_the_positions(sizes: tuple[int, ...], pairs_per_step: int) -> None:
    order = PairOrder(sizes, pairs_per_step=pairs_per_step, seed=SEED)
    starts = [sum(sizes[:bucket]) for bucket in range(len(sizes))]
    most = [0] * len(sizes)
    for step in range(60):
        assert order.visits_begun(step) == most
        for position in range(step * pairs_per_step, (step + 1) * pairs_per_step):
            index, visit = order.place(position)
            bucket = max(bucket for bucket, start in enumerate(starts) if start <= index)
            most[bucket] = max(most[bucket], visit + 1)


# ---- going on, extending, refusing ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["steps", "visits"])
def test_an_extended_cache_is_the_longer_one_to_the_byte(tmp_path: Path, layout: str, kind: str) -> None:
    pairs = NumberedPairs(LAYOUTS[layout], [1])
    shorter, longer = {kind: 2}, {kind: 4}
    asked: Any = longer
    make(tmp_path / "whole", pairs, **asked)
    asked = shorter
    make(tmp_path / "grown", pairs, **asked)
    said: list[str] = []
    computing = Computing()
    asked = longer
    make(tmp_path / "grown", pairs, said=said, computing=computing, **asked)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "whole")
    assert said[0].startswith("extending")
    whole = Computing()
    make(tmp_path / "again", pairs, computing=whole, **asked)
    assert 0 < len(computing.batches) < len(whole.batches), "what was there is not computed again"


def test_a_finished_cache_is_left_as_it_is(tmp_path: Path) -> None:
    pairs = NumberedPairs((11,))
    make(tmp_path / "cache", pairs, steps=4)
    before = files_of(tmp_path / "cache")
    for steps in (4, 2):
        said: list[str] = []
        computing = Computing()
        make(tmp_path / "cache", pairs, steps=steps, said=said, computing=computing)
        assert said == [f"{tmp_path / 'cache'} is finished already; nothing is computed"]
        assert not computing.batches
    assert files_of(tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": {"unet": "xyz"}}, "fingerprint.unet: the cache has abc, this command xyz"),
        ({"shard_pairs": 8}, "shard_pairs: the cache has 6, this command 8"),
        ({"batch_pairs": 2}, "batch_pairs: the cache has 3, this command 2"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    pairs = NumberedPairs((11,))
    make(tmp_path / "cache", pairs, steps=2)
    before = files_of(tmp_path / "cache")
    with pytest.raises(ConfigError, match=said):
        make(tmp_path / "cache", pairs, steps=4, **changes)
    assert files_of(tmp_path / "cache") == before


def test_damage_is_found_when_it_is_opened(tmp_path: Path) -> None:
    errors = make(tmp_path / "cache", NumberedPairs((11,)), steps=2)
    table = errors.folder / errors.record.table
    table.write_bytes(table.read_bytes()[:-8])
    with pytest.raises(DataError, match="cut short"):
        ReferenceErrors(errors.folder)
    table.unlink()
    with pytest.raises(DataError, match="missing, but the cache's record lists it"):
        ReferenceErrors(errors.folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"scripts/cache\.py --reference makes one"):
        ReferenceErrors(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reference.residency", "cached"], "needs reference.cache"),
        (["--reference.cache", "x"], "residency replicated ignores reference.cache x"),
        (["--reference.residency", "cached", "--reference.cache", "x", "--objective.type", "sft"], "has no reference"),
        (
            ["--reference.residency", "cached", "--reference.cache", "x", "--terms.anchor_weight", "1"],
            "terms.anchor_weight 1 needs the reference's predictions",
        ),
    ],
)
def test_a_configuration_that_cannot_read_errors_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(["--config", "miniature", *options])


# ---- of which reference ----

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
        ({"encoding": "moments of a cache in fp16"}, {"encoding"}),
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


def test_every_field_that_acts_on_errors_is_among_the_parts() -> None:
    from ds_dpo.config.fields import FIELDS

    acting = {
        spec.path
        for spec in FIELDS.values()
        if spec.is_identity
        and spec.section in ("data", "diffusion")
        and spec.path.split(".")[1] not in fingerprint_module.ACT_ON_COMPARING
    }
    assert acting <= parts_of().keys()


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
