"""Statistics of a set of pairs: prompts, labels, weights, images, repetitions, and pairs that cannot be read.

They take one pass along the files. In addition to counts of distinct values, about 75 bytes are kept for each pair: its
place, and 16-byte digests of its prompt and of each image.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ds_dpo.data.keyed_hash import keyed_hash
from ds_dpo.data.source import BadRow, BadRowError, PairRecord, PairSource
from ds_dpo.data.statistics.duplicates import find_duplicates
from ds_dpo.data.statistics.image_facts import PairFacts, facts_of_pair
from ds_dpo.data.statistics.tally import Quantiles, Tally, quantiles, quantiles_of

NUM_EXAMPLES = 20
NUM_SIZES_LISTED = 1000
PAIRS_DECODED_AHEAD = 32


@dataclass(frozen=True, kw_only=True)
class PromptStatistics:
    """Of prompts. distinct: compared exactly as in the rows. characters: length of the prompt, over pairs.

    over_75_words: number of pairs. A word is at least one token, so CLIP cuts at least these prompts.
    """

    distinct: int
    empty: int
    over_75_words: int
    characters: Quantiles
    pairs_per_prompt: Quantiles


@dataclass(frozen=True, kw_only=True)
class LabelStatistics:
    """Of pairs. first_image_won, second_image_won: from the rows' labels; None if the format has no such label."""

    first_image_won: int | None
    second_image_won: int | None
    targets_of_one: int
    targets_of_half: int
    weights_of_one: int
    target_probability: Quantiles
    weight: Quantiles


@dataclass(frozen=True, kw_only=True)
class SizeCount:
    """How often a size occurs. height, width: in pixels."""

    height: int
    width: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """Of the images of usable pairs. sizes: the most frequent ones, upright. enlarged: number of images smaller than
    their training size. aspect_ratio: width over height.
    """

    images: int
    distinct: int
    sizes: list[SizeCount]
    distinct_sizes: int
    pairs_of_two_sizes: int
    enlarged: int
    aspect_ratio: Quantiles
    formats: dict[str, int]
    modes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RepeatStatistics:
    """Of usable pairs whose images were read; the examples are uids.

    contradictions: number of questions (a prompt and two images) that one image wins in some pairs and the other image
    in other pairs. contradicting_pairs: number of pairs of these questions.
    """

    pairs_of_one_image: int
    repeated_pairs: int
    contradictions: int
    contradicting_pairs: int
    images_in_several_pairs: int
    most_pairs_of_an_image: int
    pairs_of_one_image_examples: list[str]
    repeated_pairs_examples: list[str]
    contradictions_examples: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """All statistics of a set of pairs.

    counts: the source's own. buckets: training sizes with their numbers of pairs. images, repeats: None if no image was
    read. prompts_read: number of pairs with a readable row, which prompts and labels describe. pairs_looked_into:
    number of pairs whose images were to be read, including bad ones. bad_pairs: those that training would replace.
    """

    description: str
    fingerprint: Mapping[str, str]
    counts: Mapping[str, int]
    pairs: int
    prompts_read: int
    pairs_looked_into: int
    buckets: list[SizeCount]
    prompts: PromptStatistics
    labels: LabelStatistics
    images: ImageStatistics | None
    repeats: RepeatStatistics | None
    bad_pairs: list[BadRow]


def choose_some(num_pairs: int, wanted: int | None, *, seed: int, name: str) -> NDArray[np.int64]:
    """Return the sorted indices of `wanted` random pairs; all if wanted is None or larger than num_pairs.

    name: their purpose; another name chooses other pairs.
    """
    if wanted is None or wanted >= num_pairs:
        return np.arange(num_pairs)
    generator = np.random.Generator(np.random.Philox(key=keyed_hash(name, seed, bits=128)))
    return np.sort(generator.choice(num_pairs, wanted, replace=False))


def take_statistics(
    source: PairSource,
    *,
    looked_into: NDArray[np.int64],
    threads: int = 1,
    on_pair: Callable[[int, PairRecord | BadRow], None] = lambda index, pair: None,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> DataStatistics:
    """Read every pair once, in file order, and return the statistics.

    looked_into: indices of the pairs whose images are decoded. threads: number of threads that decode. on_pair: called
    with each pair when it is read. watch: wraps the iteration over indices, like tqdm.
    """
    tally = Tally()
    is_looked_into = np.zeros(len(source), bool)
    is_looked_into[looked_into] = True
    bucket_ends, shapes = list(accumulate(source.bucket_sizes)), source.bucket_shapes
    # rows are read here, one after another, because file readers are not made for threads; the threads only decode
    decoding: deque[Callable[[], None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for index in watch(map(int, source.file_order())):
            try:
                record = source.read(index)
            except BadRowError as error:
                # queued, so that bad pairs stay in file order
                decoding.append(partial(tally.bad_pairs.append, error.bad_row))
                on_pair(index, error.bad_row)
            else:
                on_pair(index, record)
                place = tally.add_pair(record)
                if is_looked_into[index]:
                    training_size = shapes[bisect_right(bucket_ends, index)]
                    future = pool.submit(facts_of_pair, record, training_size=training_size)
                    decoding.append(partial(_settle, tally, place, index, record, future))
            if len(decoding) > PAIRS_DECODED_AHEAD:
                decoding.popleft()()
        for settle in decoding:
            settle()
    return _summarise(source, tally, num_looked_into=len(looked_into))


def _settle(tally: Tally, place: int, index: int, record: PairRecord, future: Future[PairFacts]) -> None:
    facts = future.result()
    if isinstance(facts, str):
        tally.bad_pairs.append(BadRow(uid=record.uid, reason=facts))
    else:
        tally.add_images(place, index, record, *facts)


def _summarise(source: PairSource, tally: Tally, *, num_looked_into: int) -> DataStatistics:
    return DataStatistics(
        description=source.description,
        fingerprint=dict(source.fingerprint),
        counts=dict(source.counts),
        pairs=len(source),
        prompts_read=tally.characters.total(),
        pairs_looked_into=num_looked_into,
        buckets=[
            SizeCount(height=height, width=width, count=size)
            for (height, width), size in zip(source.bucket_shapes, source.bucket_sizes, strict=True)
        ],
        prompts=_prompts(tally),
        labels=_labels(tally),
        images=_images(tally) if tally.sizes else None,
        repeats=_repeats(source, tally) if tally.sizes else None,
        bad_pairs=tally.bad_pairs,
    )


def _prompts(tally: Tally) -> PromptStatistics:
    pairs_per_prompt = np.unique(tally.prompts.array(), return_counts=True)[1]
    return PromptStatistics(
        distinct=len(pairs_per_prompt),
        empty=tally.empty_prompts,
        over_75_words=tally.long_prompts,
        characters=quantiles(tally.characters),
        pairs_per_prompt=quantiles_of(pairs_per_prompt),
    )


def _labels(tally: Tally) -> LabelStatistics:
    sides = tally.label_winners
    return LabelStatistics(
        first_image_won=sides["first"] if sides else None,
        second_image_won=sides["second"] if sides else None,
        targets_of_one=tally.targets[1.0],
        targets_of_half=tally.targets[0.5],
        weights_of_one=tally.weights[1.0],
        target_probability=quantiles(tally.targets),
        weight=quantiles(tally.weights),
    )


def _images(tally: Tally) -> ImageStatistics:
    aspect_ratios: Counter[float] = Counter()
    for (height, width), count in tally.sizes.items():
        aspect_ratios[width / height] += count
    digests = np.concatenate([tally.chosen.array(), tally.rejected.array()])
    return ImageStatistics(
        images=tally.sizes.total(),
        distinct=len(np.unique(digests)),
        sizes=[
            SizeCount(height=height, width=width, count=count)
            for (height, width), count in sorted(tally.sizes.items(), key=lambda item: (-item[1], item[0]))
        ][:NUM_SIZES_LISTED],
        distinct_sizes=len(tally.sizes),
        pairs_of_two_sizes=tally.pairs_of_two_sizes,
        enlarged=tally.enlarged_images,
        aspect_ratio=quantiles(aspect_ratios),
        formats=dict(tally.formats.most_common()),
        modes=dict(tally.modes.most_common()),
    )


def _repeats(source: PairSource, tally: Tally) -> RepeatStatistics:
    found = find_duplicates(
        prompts=tally.prompts.array()[np.frombuffer(tally.places, np.int64)],
        chosen=tally.chosen.array(),
        rejected=tally.rejected.array(),
        winners=np.frombuffer(tally.winners, np.int8),
    )
    indices = np.frombuffer(tally.indices, np.int64)

    def uids(places: NDArray[np.int64]) -> list[str]:
        return [source.read(int(indices[place])).uid for place in places[:NUM_EXAMPLES]]

    return RepeatStatistics(
        pairs_of_one_image=len(found.pairs_of_one_image),
        repeated_pairs=len(found.repeated_pairs),
        contradictions=len(found.contradictions),
        contradicting_pairs=found.contradicting_pairs,
        images_in_several_pairs=int(np.count_nonzero(found.pairs_per_image > 1)),
        most_pairs_of_an_image=int(found.pairs_per_image.max()),
        pairs_of_one_image_examples=uids(found.pairs_of_one_image),
        repeated_pairs_examples=uids(found.repeated_pairs),
        contradictions_examples=list(
            zip(uids(found.contradictions[:, 0]), uids(found.contradictions[:, 1]), strict=True)
        ),
    )
