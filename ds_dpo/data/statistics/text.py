"""DataStatistics as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ds_dpo.config.data import DataConfig
from ds_dpo.data.statistics.statistics import DataStatistics, ImageStatistics, SizeCount
from ds_dpo.data.statistics.tally import Quantiles

LABEL_WIDTH = 34
NUM_SIZES_SHOWN, NUM_BAD_SHOWN, NUM_EXAMPLES_SHOWN = 10, 20, 3


def statistics_text(statistics: DataStatistics, data: DataConfig) -> str:
    """Return all statistics as headings with lines."""
    blocks = {
        "pairs": _pairs(statistics),
        "prompts": _prompts(statistics),
        "labels": _labels(statistics),
        "images": _images(statistics, data),
        "repetitions": _repeats(statistics),
        "bad pairs": _bad_pairs(statistics, data),
    }
    return "\n\n".join("\n".join([heading, *lines]) for heading, lines in blocks.items())


def _pairs(statistics: DataStatistics) -> Iterator[str]:
    counts = statistics.counts
    if "rows" in counts:
        candidates, ties = counts.get("candidates", counts["rows"]), counts.get("ties", 0)
        yield _line("rows", f"{counts['rows']:,}")
        if "candidates" in counts:
            yield _line("pairs in these rows", f"{candidates:,}")
        yield _line("decided", _share(candidates - ties, candidates))
        yield _line("ties", _share(ties, candidates))
    for name, count in counts.items():
        if name.startswith("dropped_") and count:
            yield _line(f"left out: {name.removeprefix('dropped_').replace('_', ' ')}", f"{count:,}")
    yield _line("pairs to train on", f"{statistics.pairs:,}")
    yield _line("pairs whose images were read", _share(statistics.pairs_looked_into, statistics.pairs))


def _prompts(statistics: DataStatistics) -> Iterator[str]:
    prompts = statistics.prompts
    yield _line("distinct", f"{prompts.distinct:,}")
    yield _line("pairs per prompt", _quantiles(prompts.pairs_per_prompt))
    yield _line("characters, over all pairs", _quantiles(prompts.characters))
    yield _line("pairs with an empty prompt", f"{prompts.empty:,}")
    yield _line(
        "pairs with more than 75 words", f"{prompts.over_75_words:,} (CLIP cuts these, and perhaps more, to 75 tokens)"
    )


def _labels(statistics: DataStatistics) -> Iterator[str]:
    labels, pairs = statistics.labels, statistics.prompts_read
    if labels.first_image_won is None or labels.second_image_won is None:
        yield _line("first image won", "not known: this format does not say which image was first")
    else:
        decided = labels.first_image_won + labels.second_image_won
        yield _line("first image won", f"{_share(labels.first_image_won, decided)} of {decided:,} decided")
    for name, ones, found in (
        ("target probability", labels.targets_of_one, labels.target_probability),
        ("weight", labels.weights_of_one, labels.weight),
    ):
        is_plain = ones == pairs
        yield _line(name, "1 for all" if is_plain else f"1 for {_share(ones, pairs)}; {_quantiles(found)}")
    if labels.targets_of_half:
        yield _line("target 0.5 (ties)", _share(labels.targets_of_half, pairs))


def _images(statistics: DataStatistics, data: DataConfig) -> Iterator[str]:
    images = statistics.images
    if images is None:
        yield _line("images", "no image was read")
    else:
        yield _line("images", f"{images.images:,}, of which {images.distinct:,} are distinct files")
        yield _line("formats", _shares(images.formats))
        yield _line("modes", _shares(images.modes))
        yield _line("width / height", _quantiles(images.aspect_ratio))
        yield _line(
            "enlarged by training", f"{_share(images.enlarged, images.images)} are smaller than the training size"
        )
        yield _line("pairs with two image sizes", f"{images.pairs_of_two_sizes:,}")
        yield from _sizes(images)
    title = "pairs by bucket, height x width" if data.aspect_buckets else "training size, height x width"
    yield from _table(title, statistics.buckets, statistics.pairs)


def _sizes(images: ImageStatistics) -> Iterator[str]:
    shown = images.sizes[:NUM_SIZES_SHOWN]
    yield from _table("images by size, height x width", shown, images.images)
    if images.distinct_sizes > len(shown):
        rest = images.images - sum(size.count for size in shown)
        yield _line("", f"{images.distinct_sizes - len(shown):,} other sizes  {_share(rest, images.images)}")


def _repeats(statistics: DataStatistics) -> Iterator[str]:
    repeats = statistics.repeats
    if repeats is None:
        yield _line("images", "no image was read")
        return
    if statistics.pairs_looked_into < statistics.pairs:
        yield _line("", f"among the {statistics.pairs_looked_into:,} pairs whose images were read; there may be more")
    yield _line("images in several pairs", f"{repeats.images_in_several_pairs:,}")
    yield _line("most pairs with the same image", f"{repeats.most_pairs_of_an_image:,}")
    yield _line("both images are the same file", f"{repeats.pairs_of_one_image:,} pairs")
    yield from _examples(repeats.pairs_of_one_image_examples)
    yield _line("repeats an earlier pair", f"{repeats.repeated_pairs:,} pairs")
    yield from _examples(repeats.repeated_pairs_examples)
    yield _line(
        "contradictions",
        f"{repeats.contradictions:,}, in {repeats.contradicting_pairs:,} pairs (same prompt and images, but "
        "another winner)",
    )
    yield from _examples([f"{one} / {other}" for one, other in repeats.contradictions_examples])


def _bad_pairs(statistics: DataStatistics, data: DataConfig) -> Iterator[str]:
    bad = statistics.bad_pairs
    looked = statistics.pairs_looked_into
    yield _line("bad pairs", f"{len(bad):,}" + ("" if looked == statistics.pairs else f", images of {looked:,} read"))
    for row in bad[:NUM_BAD_SHOWN]:
        yield f"    {row}"
    if len(bad) > NUM_BAD_SHOWN:
        yield f"    and {len(bad) - NUM_BAD_SHOWN:,} more"
    if not bad:
        return
    if len(bad) <= data.max_bad_rows:
        yield f"  a run replaces each by another pair, at most {data.max_bad_rows:,} times (data.max_bad_rows)"
    else:
        yield f"  a run would stop within an epoch: data.max_bad_rows is {data.max_bad_rows:,}"


def _line(label: str, value: str) -> str:
    return f"  {label:<{LABEL_WIDTH}} {value}"


def _examples(uids: Sequence[str]) -> Iterator[str]:
    yield from (f"    such as {uid}" for uid in uids[:NUM_EXAMPLES_SHOWN])


def _table(title: str, sizes: Sequence[SizeCount], total: int) -> Iterator[str]:
    for place, size in enumerate(sizes):
        dimensions = f"{size.height} x {size.width}"
        yield _line(title if place == 0 else "", f"{dimensions:>13}  {_share(size.count, total)}")


def _share(part: int, whole: int) -> str:
    return f"{part:,}" if not whole else f"{part:,} ({100 * part / whole:.1f} %)"


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {_share(count, total)}" for name, count in counts.items())


def _quantiles(found: Quantiles) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items()) or "none"
