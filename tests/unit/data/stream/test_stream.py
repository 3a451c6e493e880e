"""The stream is the same for any number of ranks, micro-batches, workers or restarts, and replaces bad rows."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, fields
from itertools import islice

import pytest
import torch
from datasets import Dataset
from pair_files import ListedPairs, config, file_of, picture, row
from repository import SUPPORT

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.data.stream.loader import MAX_REPLACEMENTS, _Loaded, open_stream
from ds_dpo.data.stream.order import PairOrder, place_of, replacement_index
from ds_dpo.data.stream.prepare import OnlinePairs, join_samples
from ds_dpo.diffusion.noising import Noising
from ds_dpo.diffusion.timesteps import timestep_distribution
from ds_dpo.errors import DataError

PAIRS_PER_STEP = 8
RANDOM = {"crop": "random", "flip": "independent", "prompt_dropout": 0.3, "size_conditioning": "true"}
# all draws that there are
NOISING = Noising(
    timesteps=timestep_distribution(
        DiffusionConfig(timestep_sampling="logit_normal", logit_mean=0, logit_std=1), num_train_timesteps=1000
    ),
    noise_offset=0.1,
    input_perturbation=0.1,
)


def stream_of(source, *, rank=0, world=1, micro=8, pairs_seen=0, seed=3, say=None, **fields):
    data = config(**fields)
    pairs = OnlinePairs(source, data=data, seed=seed, latent_shape=lambda size: (4, 2, 2), noising=NOISING)
    return open_stream(
        pairs,
        data=data,
        seed=seed,
        pairs_per_step=PAIRS_PER_STEP,
        micro_batch_pairs=micro,
        rank=rank,
        world_size=world,
        pairs_seen=pairs_seen,
        say=say or (lambda line: None),
    )


def steps_of(source, num_steps, *, world=1, micro=8, **options):
    """Return the pairs of each step in their global order, whoever computed them."""
    accumulation = PAIRS_PER_STEP // (world * micro)
    streams = [iter(stream_of(source, rank=rank, world=world, micro=micro, **options)) for rank in range(world)]
    return [
        join_samples([part for stream in streams for part in islice(stream, accumulation)]) for _ in range(num_steps)
    ]


def differing(steps, others):
    """Names of fields that are not equal in every step."""
    assert len(steps) == len(others)
    pairs = list(zip(steps, others, strict=True))
    names = [field.name for field in fields(steps[0])]
    return {name for name in names for a, b in pairs if not equal(getattr(a, name), getattr(b, name))}


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- the same for any layout ----

# 23 pairs are no multiple of the step, so that steps span epochs; as buckets, one is smaller than a step
SHAPES = [(16, 24), (16, 16), (24, 16)]
SOURCES = {"square": ListedPairs(23), "buckets": ListedPairs(13, 3, 7, bucket_shapes=SHAPES)}
NUM_STEPS = 9  # 72 pairs: epochs 0, 1, 2 and part of 3


@pytest.fixture(scope="module")
def references():
    return {name: steps_of(source, NUM_STEPS, **RANDOM) for name, source in SOURCES.items()}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("world", "micro"), [(2, 2), (4, 1), (1, 1), (8, 1), (2, 4)])
def test_a_step_is_the_same_for_any_world_size_and_micro_batch(name, world, micro, references):
    steps = steps_of(SOURCES[name], NUM_STEPS, world=world, micro=micro, **RANDOM)
    assert differing(references[name], steps) == set()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("micro", "workers"), [(8, 1), (8, 3), (2, 3)])
def test_a_step_is_the_same_for_any_number_of_workers(name, micro, workers, references):
    steps = steps_of(SOURCES[name], NUM_STEPS, micro=micro, workers=workers, prefetch=3, **RANDOM)
    assert differing(references[name], steps) == set()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("done", "world", "micro", "workers"), [(1, 2, 2, 0), (3, 4, 1, 1), (4, 2, 4, 3), (6, 1, 8, 1), (7, 8, 1, 0)]
)
def test_a_resumed_stream_goes_on_where_it_was(name, done, world, micro, workers, references):
    pairs_seen = done * PAIRS_PER_STEP
    layout = {"world": world, "micro": micro, "workers": workers}
    resumed = steps_of(SOURCES[name], NUM_STEPS - done, pairs_seen=pairs_seen, **layout, **RANDOM)
    assert differing(references[name][done:], resumed) == set()


def test_steps_hold_the_order_s_pairs_and_drop_nothing(references):
    seen = torch.cat([step.pair_ids for step in references["square"]]).tolist()
    ids = [id_of(f"row {index}") for index in range(23)]
    assert seen == [ids[place_of(position, num_pairs=23, seed=3)[0]] for position in range(72)]
    for epoch in range(3):
        assert sorted(seen[epoch * 23 : epoch * 23 + 23]) == sorted(ids)


def test_all_pairs_of_a_step_are_of_one_bucket_and_have_its_size(references):
    order = PairOrder([13, 3, 7], pairs_per_step=PAIRS_PER_STEP, seed=3)
    bucket_of = [0] * 13 + [1] * 3 + [2] * 7
    shapes_seen = []
    for number, step in enumerate(references["buckets"]):
        indices = [order.place(number * PAIRS_PER_STEP + offset)[0] for offset in range(PAIRS_PER_STEP)]
        assert step.pair_ids.tolist() == [id_of(f"row {index}") for index in indices]
        (bucket,) = {bucket_of[index] for index in indices}
        height, width = SHAPES[bucket]
        assert step.chosen_pixels.shape == step.rejected_pixels.shape == (8, 3, height, width)
        assert step.chosen_time_ids[:, 4:].unique(dim=0).tolist() == [[height, width]]
        shapes_seen.append(SHAPES[bucket])
    # epochs 0, 1 and 2 have floor(3 n / 8) steps of a bucket of n pairs: 4, 1 and 2; the last two are of epoch 3
    assert [shapes_seen[:7].count(shape) for shape in SHAPES] == [4, 1, 2]


def test_noise_has_the_latent_shape_of_its_bucket():
    source = ListedPairs(8, 8, bucket_shapes=[(16, 24), (24, 16)])
    pairs = OnlinePairs(
        source,
        data=config(),
        seed=0,
        latent_shape=lambda size: (4, size[0] // 8, size[1] // 8),
        noising=Noising.plain(10),
    )
    for index, shape in [(0, (1, 4, 2, 3)), (7, (1, 4, 2, 3)), (8, (1, 4, 3, 2)), (15, (1, 4, 3, 2))]:
        samples = pairs.read(index, visit=0)
        assert samples.noise.shape == samples.chosen_posterior_noise.shape == shape


def test_a_pair_s_draws_differ_from_visit_to_visit_and_from_pair_to_pair(references):
    for steps in references.values():
        noise = torch.cat([step.noise for step in steps])
        assert len(noise.flatten(1).unique(dim=0)) == 72


def test_resuming_after_a_billion_pairs_starts_at_once():
    source = ListedPairs(10**9)
    step = next(iter(stream_of(source, pairs_seen=10**12)))
    expected = [place_of(10**12 + offset, num_pairs=10**9, seed=3)[0] for offset in range(PAIRS_PER_STEP)]
    assert step.pair_ids.tolist() == [id_of(f"row {index}") for index in expected]


def test_one_pair_is_a_dataset():
    (step,) = steps_of(ListedPairs(1), 1)
    assert len(step.pair_ids.unique()) == 1
    assert len(step.noise.flatten(1).unique(dim=0)) == PAIRS_PER_STEP  # 8 visits


# ---- options are independent ----

SOURCE = ListedPairs(11)


@pytest.mark.parametrize(
    ("option", "moved"),
    [
        ({"flip": "shared"}, {"chosen_pixels", "rejected_pixels"}),
        ({"flip": "independent"}, {"chosen_pixels", "rejected_pixels"}),
        ({"crop": "random"}, {"chosen_pixels", "rejected_pixels"}),
        ({"prompt_dropout": 0.5}, {"prompts"}),
        ({"size_conditioning": "true"}, {"chosen_time_ids", "rejected_time_ids"}),
    ],
)
def test_an_option_moves_only_what_it_is_about(option, moved):
    assert differing(steps_of(SOURCE, 2), steps_of(SOURCE, 2, **option)) == moved


def test_another_size_moves_only_pixels_and_sizes():
    other = steps_of(ListedPairs(11, bucket_shapes=[(24, 16)]), 2)
    moved = {"chosen_pixels", "rejected_pixels", "chosen_time_ids", "rejected_time_ids"}
    assert differing(steps_of(SOURCE, 2), other) == moved


def test_shared_flips_are_shared_and_independent_ones_are_not():
    plain, shared, independent = (steps_of(SOURCE, 3, flip=flip) for flip in ("off", "shared", "independent"))

    def flipped(steps, side):
        pixels = [
            (a, b)
            for x, y in zip(plain, steps, strict=True)
            for a, b in zip(getattr(x, side), getattr(y, side), strict=True)
        ]
        assert all(torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in pixels)
        return [not torch.equal(a, b) for a, b in pixels]

    assert flipped(shared, "chosen_pixels") == flipped(shared, "rejected_pixels")
    assert flipped(shared, "chosen_pixels") == flipped(independent, "chosen_pixels")
    assert flipped(independent, "chosen_pixels") != flipped(independent, "rejected_pixels")
    assert 4 <= sum(flipped(shared, "chosen_pixels")) <= 20  # of 24


def test_the_seed_changes_order_and_draws():
    moved = differing(steps_of(SOURCE, 1, seed=3), steps_of(SOURCE, 1, seed=4))
    assert {"pair_ids", "noise", "timesteps"} <= moved


def test_shapes_and_types():
    (step,) = steps_of(SOURCE, 1)
    assert step.chosen_pixels.shape == step.rejected_pixels.shape == (8, 3, 16, 16)
    assert step.noise.shape == step.chosen_posterior_noise.shape == step.rejected_posterior_noise.shape == (8, 4, 2, 2)
    assert step.chosen_time_ids.shape == step.rejected_time_ids.shape == (8, 6)
    assert step.pair_ids.dtype == step.timesteps.dtype == torch.int64
    floats = (step.chosen_pixels, step.noise, step.chosen_time_ids, step.rejected_posterior_noise)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert len(step.prompts) == 8


def test_reading_takes_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(iter(stream_of(SOURCE, workers=workers)))
    assert torch.equal(before, torch.get_rng_state())


@dataclass(frozen=True, kw_only=True)
class SomeSamples:
    latents: torch.Tensor
    pooled: torch.Tensor | None
    prompts: list[str]


def test_every_tensor_of_any_samples_is_pinned_and_the_rest_is_left(monkeypatch):
    # page-locked memory needs an accelerator: a double stands in for it
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: 2 * tensor)
    for pooled in (None, torch.ones(2)):
        samples = SomeSamples(latents=torch.arange(3), pooled=pooled, prompts=["a"])
        pinned = _Loaded(samples=samples, bad_rows=[]).pin_memory().samples
        assert pinned.latents.tolist() == [0, 2, 4]
        assert pinned.prompts == ["a"]
        assert pinned.pooled is None if pooled is None else pinned.pooled.tolist() == [2, 2]


def test_samples_of_any_kind_are_joined_in_order():
    parts = [SomeSamples(latents=torch.full((1, 2), n), pooled=None, prompts=[str(n)]) for n in range(3)]
    joined = join_samples(parts)
    assert joined.latents.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (joined.pooled, joined.prompts) == (None, ["0", "1", "2"])


# ---- bad rows ----

WITH_BAD = ListedPairs(11, bad={2, 7}, torn={4})
BUCKETS_WITH_BAD = ListedPairs(6, 5, bucket_shapes=[(16, 24), (24, 16)], bad={2, 7}, torn={4})


@pytest.mark.parametrize("source", [WITH_BAD, BUCKETS_WITH_BAD])
def test_bad_rows_are_replaced_alike_everywhere(source):
    plain = steps_of(source, 5, **RANDOM)
    unreadable = {id_of(f"row {index}") for index in (2, 4, 7)}
    assert unreadable.isdisjoint(torch.cat([step.pair_ids for step in plain]).tolist())
    for world, micro, workers in [(2, 2, 0), (4, 1, 0), (1, 4, 2)]:
        steps = steps_of(source, 5, world=world, micro=micro, workers=workers, **RANDOM)
        assert differing(plain, steps) == set()
    resumed = steps_of(source, 2, world=2, micro=4, pairs_seen=3 * PAIRS_PER_STEP, **RANDOM)
    assert differing(plain[3:], resumed) == set()


def test_a_replacement_brings_its_own_draws_and_others_keep_theirs():
    without, with_bad = steps_of(SOURCE, 5), steps_of(WITH_BAD, 5)
    ids, bad_ids = (torch.cat([step.pair_ids for step in steps]) for steps in (without, with_bad))
    replaced = ids != bad_ids
    unreadable = {id_of(f"row {index}") for index in (2, 4, 7)}
    assert set(ids[replaced].tolist()) == unreadable
    assert unreadable.isdisjoint(bad_ids.tolist())
    noise, bad_noise = (torch.cat([step.noise for step in steps]) for steps in (without, with_bad))
    assert torch.equal(noise[~replaced], bad_noise[~replaced])
    assert not any(torch.equal(a, b) for a, b in zip(noise[replaced], bad_noise[replaced], strict=True))
    # the first position that is replaced: by the formula, and with the draws of that pair in that epoch
    position = int(replaced.nonzero()[0])
    attempt, index = 1, replacement_index(position, 1, num_pairs=11, seed=3)
    while index in (2, 4, 7):
        attempt += 1
        index = replacement_index(position, attempt, num_pairs=11, seed=3)
    assert bad_ids[position] == id_of(f"row {index}")
    epoch = position // 11
    own = next(p for p in range(11 * epoch, 11 * epoch + 11) if place_of(p, num_pairs=11, seed=3)[0] == index)
    assert torch.equal(bad_noise[position], noise[own])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_counted_and_named_in_this_process(workers):
    lines = []
    stream = stream_of(WITH_BAD, workers=workers, micro=4, say=lines.append)
    assert stream.bad_rows == []
    for _ in islice(stream, 4):  # 16 positions: the whole first epoch
        pass
    found = {bad_row.uid: bad_row.reason for bad_row in stream.bad_rows}
    assert found == {"row 2": "no caption", "row 7": "no caption", "row 4": f"rejected image: {found['row 4']}"[16:]}
    assert found["row 4"].startswith("rejected image: not an image")
    assert lines == [f"bad row replaced: {bad_row}" for bad_row in stream.bad_rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_bad_rows_than_allowed_is_an_error_that_lists_them(workers):
    stream = stream_of(WITH_BAD, workers=workers, micro=4, max_bad_rows=0)
    head, a_row = (
        r"\d rows cannot be read, but data.max_bad_rows allows 0; repair them, or raise the limit:",
        r"row \d: (no caption|rejected image: .*)",
    )
    message = rf"^{head}(\n  {a_row})+$"
    with pytest.raises(DataError, match=message):
        list(islice(stream, 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_bad_rows_ends_with_the_plain_error(workers):
    stream = stream_of(ListedPairs(5, bad=range(5)), workers=workers, max_bad_rows=1000)
    # to the end of the text: no traceback of a worker around it
    message = rf"^position 0: neither its pair nor {MAX_REPLACEMENTS} replacements can be read; .* row \d: no caption$"
    with pytest.raises(DataError, match=message):
        next(iter(stream))
    assert len(stream.bad_rows) == MAX_REPLACEMENTS + 1


class Unreachable(ListedPairs):
    def read(self, index):
        raise DataError("the disk is gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_source_reaches_the_user_as_it_is(workers):
    with pytest.raises(DataError, match=r"^the disk is gone$"):
        next(iter(stream_of(Unreachable(3), workers=workers)))


# ---- workers ----


def worker_pids():
    return {process.pid for process in multiprocessing.active_children()}


def test_workers_ignore_signals_that_are_meant_for_the_trainer():
    before = worker_pids()
    iterator = iter(stream_of(SOURCE, workers=2))
    next(iterator)  # one of the workers may still be starting
    workers = worker_pids() - before
    assert len(workers) == 2
    script = (
        "import os, sys; [os.kill(int(pid), int(number)) for pid in sys.argv[2:] for number in sys.argv[1].split(',')]"
    )
    numbers = ",".join(str(int(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    subprocess.run([sys.executable, "-S", "-c", script, numbers, *map(str, workers)], check=True)
    for _ in range(6):
        next(iterator)
    assert workers <= worker_pids()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


DEAD_WORKER = """
    import multiprocessing, os, signal, sys
    sys.path[:0] = {folders!r}
    from ds_dpo.errors import DataError
    from pair_files import ListedPairs
    from test_stream import stream_of
    iterator = iter(stream_of(ListedPairs(5), workers=1))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet taken note of
    print("still training", flush=True)  # nothing is raised here
    try:
        for _ in range(10):
            next(iterator)
    except DataError as error:
        print(error, flush=True)
"""


def test_a_worker_that_died_is_an_error_of_next_and_of_no_other_line():
    lines = run_program(DEAD_WORKER).splitlines()
    assert lines[0] == "still training"
    assert re.fullmatch(
        r"a loader process died \(DataLoader worker \(pid.*\) exited unexpectedly\); usually memory or shared memory "
        r"\(/dev/shm\) was exhausted: lower data.workers, or provide more memory",
        lines[1],
    )
    assert len(lines) == 2


def test_another_failure_of_the_loader_is_left_as_it_is(monkeypatch):
    class FailingLoader:
        def __init__(self, *args, **options):
            pass

        def __iter__(self):
            return self

        def __next__(self):
            raise RuntimeError("another failure")

    monkeypatch.setattr("ds_dpo.data.stream.loader.DataLoader", FailingLoader)
    with pytest.raises(RuntimeError, match=r"^another failure$"):
        next(iter(stream_of(SOURCE, workers=1)))


FORKED_AFTER_THREADS = """
    import sys, torch
    sys.path[:0] = {folders!r}
    from pair_files import ListedPairs
    from test_stream import stream_of
    torch.set_num_threads(2)
    (torch.randn(500, 500) @ torch.randn(500, 500)).sum().item()  # starts OpenMP's threads
    iterator = iter(stream_of(ListedPairs(5), workers=2, resolution=64))
    for _ in range(4):
        next(iterator)
    print("done", flush=True)
"""


def run_program(script):
    script = textwrap.dedent(script.format(folders=[str(SUPPORT), os.path.dirname(__file__)]))
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_workers_run_beside_openmp_threads_and_end_with_the_program():
    assert run_program(FORKED_AFTER_THREADS) == "done\n"


# ---- from files to samples ----


def test_a_parquet_file_through_workers(tmp_path):
    rows = [row(number, label_0=float(number % 2)) for number in range(6)]
    rows[3]["jpg_0"] = file_of(picture(6))[:100]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    source = open_source(config(tmp_path / "a.parquet", cache_dir=str(tmp_path / "cache")), say=print)
    plain = steps_of(source, 2, micro=4)
    assert differing(plain, steps_of(source, 2, micro=4, workers=2)) == set()
    stream = stream_of(source)
    for _ in islice(stream, 2):
        pass
    assert {bad_row.uid for bad_row in stream.bad_rows} == {
        f"row 3 of {tmp_path / 'a.parquet'}, split train (ranking_id 103)"
    }
    by_id = {id_of(f"{100 + n} left-{n} right-{n}"): n for n in range(6)}
    for step in plain:
        for pair_id, prompt in zip(step.pair_ids.tolist(), step.prompts, strict=True):
            assert prompt == f"prompt {by_id[pair_id]}"
