"""Describe preference pairs before you train on them: counts, labels, sizes, repetitions, bad images, a page of pairs.

    python scripts/data_stats.py --config sdxl_pickapic --out stats
    python scripts/data_stats.py --dataset /data/my_pairs --images all --fail_on bad contradictions

Takes --config and all options of ds_dpo/train.py (see its --help). With the same data options it sees the same pairs as
training, after the same filters. --seed chooses the random pairs. Needs neither a model nor a GPU.

Reads every row with its images; use --data.max_rows N for a quick look. Memory: counts of distinct values, about 75
bytes for each pair, and several times that while pairs are compared at the end.

Prints the statistics. With --out DIR, also writes DIR/data_stats.json, DIR/sheet.html and DIR/sheet.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_dpo.config.program_options import program_parser, user_path
from ds_dpo.errors import ConfigError

if TYPE_CHECKING:
    from ds_dpo.config.run import RunConfig
    from ds_dpo.data.source import BadRow, PairRecord
    from ds_dpo.data.statistics.statistics import DataStatistics

    Shown = PairRecord | BadRow

EXIT_STATUS_OF_FINDING = 1


def count_or_word(text: str) -> int | None:
    words = {"all": None, "none": 0}
    if text in words:
        return words[text]
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}; must be all, none or a number of pairs")


def pairs_of_sheet(text: str) -> int:
    if text.isdecimal() and int(text) <= 1000:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}; must be a number of pairs from 0 to 1000")


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = program_parser("data-stats", __doc__)
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="DIR",
        help="Folder for data_stats.json, sheet.html and sheet.png (off if unset).",
    )
    parser.add_argument(
        "--sample", type=pairs_of_sheet, default=24, metavar="N", help="Number of pairs on the sheet (default: 24)."
    )
    parser.add_argument(
        "--images",
        type=count_or_word,
        default=10_000,
        metavar="{all,none,N}",
        help="Number of random pairs whose images are decoded, to find sizes, repetitions and bad images "
        "(default: 10000).",
    )
    parser.add_argument(
        "--fail_on",
        nargs="+",
        choices=("bad", "contradictions"),
        default=[],
        help=f"Exit with status {EXIT_STATUS_OF_FINDING} if there are any of these.",
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Print the statistics of the pairs that the arguments choose."""
    arguments, of_run = parse_arguments(argv)
    from ds_dpo.config.load import load_config
    from ds_dpo.process.quiet import quiet_libraries, quiet_output

    loaded = load_config(of_run)
    config = loaded.config
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out} is a file; give a folder")
    quiet_libraries()
    print(*loaded.remarks, sep="\n", end="\n" if loaded.remarks else "")
    with quiet_output():  # libraries print what they lack when they are imported
        from tqdm import tqdm

        from ds_dpo.data.reading.run_pairs import open_trained_on
        from ds_dpo.data.statistics.statistics import choose_some, take_statistics
        from ds_dpo.data.statistics.text import statistics_text

    source = open_trained_on(config, say=print, in_file_order=True)
    shown = choose_some(len(source), arguments.sample, seed=config.seed, name="sheet")
    kept: dict[int, Shown | None] = dict.fromkeys(map(int, shown))

    def keep(index: int, pair: Shown) -> None:
        if index in kept:
            kept[index] = pair

    statistics = take_statistics(
        source,
        looked_into=choose_some(len(source), arguments.images, seed=config.seed, name="images"),
        threads=min(max(1, config.data.workers), os.cpu_count() or 1),
        on_pair=keep,
        watch=lambda indices: tqdm(
            indices, total=len(source), unit="pair", leave=False, mininterval=0.5 if sys.stderr.isatty() else 30
        ),
    )
    text = statistics_text(statistics, config.data)
    print(statistics.description, text, sep="\n\n")
    if arguments.out is not None:
        pairs = [pair for pair in kept.values() if pair is not None]
        _write_files(arguments.out, statistics, text, pairs, config)
    findings = {
        "bad": bool(statistics.bad_pairs),
        "contradictions": bool(statistics.repeats and statistics.repeats.contradictions),
    }
    if found := [name for name in arguments.fail_on if findings[name]]:
        print(f"failed: there are {', '.join(found)}", file=sys.stderr)
        sys.exit(EXIT_STATUS_OF_FINDING)


def _write_files(
    folder: Path, statistics: DataStatistics, text: str, pairs: Sequence[Shown], config: RunConfig
) -> None:
    from ds_dpo.evaluation.pages.pair_picture import sheet_picture
    from ds_dpo.evaluation.pages.pair_sheet import sheet_html, sheet_pair
    from ds_dpo.evaluation.pages.picture import save_file, save_png

    title = f"{config.data.dataset}, split {config.data.split}"
    notes = [
        f"All {len(pairs):,} pairs."
        if len(pairs) == statistics.pairs
        else f"{len(pairs)} of {statistics.pairs:,} pairs, drawn at random (seed {config.seed}), not selected.",
        "Left and right are as in the dataset if it says so, else the winner is on the left. Sizes are height x width.",
    ]
    sheet = [sheet_pair(pair) for pair in pairs]
    numbers = dataclasses.asdict(statistics) | {"data": config.data.model_dump(mode="json"), "seed": config.seed}
    save_file(folder / "data_stats.json", json.dumps(numbers, indent=1).encode())
    page = sheet_html(sheet, title=title, notes=notes, details=f"{statistics.description}\n\n{text}")
    save_file(folder / "sheet.html", page)
    save_png(sheet_picture(sheet, title=title, notes=notes), folder / "sheet.png")
    print(f"\nwritten: {folder}/data_stats.json, sheet.html, sheet.png")
