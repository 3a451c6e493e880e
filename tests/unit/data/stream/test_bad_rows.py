"""A row that cannot be read is replaced alike for any number of ranks, counted and named; too many are an error."""

from itertools import islice

import pytest
import torch
from pair_files import ListedPairs
from stream_steps import PAIRS_PER_STEP, RANDOM, differing, steps_of, stream_of

from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.stream.loader import MAX_REPLACEMENTS
from ds_dpo.data.stream.order import place_of, replacement_index
from ds_dpo.errors import DataError

SOURCE = ListedPairs(11)
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
