"""Encode the pairs of a run, or compute the errors of its reference, once before training, for training to read.

Takes the options of the run (see ds_dpo/train.py --help) in addition to those below. Runs on any number of ranks. If it
is killed, the same command continues it.

By default it encodes each distinct image and prompt of the run's pairs. Train from them with --data.cache FOLDER and
the same options. With --reference it computes the two errors of the frozen reference for each pair in each epoch
instead. Train with --reference.residency cached --reference.cache FOLDER; then no reference is in memory.

    deepspeed --num_gpus 8 scripts/cache.py --config sdxl_pickapic --out caches/pickapic
    python scripts/cache.py --config miniature --out runs/cache --dtype fp32
    python scripts/cache.py --config sdxl_pickapic --out caches/pickapic --verify
    deepspeed --num_gpus 8 scripts/cache.py --reference --config sdxl_pickapic --out caches/reference
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ds_dpo.config.load import load_config
from ds_dpo.config.program_options import count, program_parser, user_path
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import read_environment
from ds_dpo.errors import ConfigError
from ds_dpo.precision import TORCH_NAMES


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's own options, and the run's."""
    parser = program_parser("cache", __doc__)
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FOLDER",
        help="Folder of the cache (default: data.cache, else output_dir with _cache added to its name; with "
        "--reference: reference.cache, else output_dir with _reference added).",
    )
    parser.add_argument("--reference", action="store_true", help="Compute errors of the reference, and encode nothing.")
    parser.add_argument(
        "--visits",
        type=count,
        metavar="N",
        help="With --reference: compute all pairs of N epochs (default: only the pairs in max_train_steps steps).",
    )
    parser.add_argument(
        "--store",
        choices=["moments", "mean"],
        help="What to store of each image: moments (mean and log-variance, so that each epoch draws its own latent), "
        "or the mean alone, at half the size (default: moments).",
    )
    parser.add_argument(
        "--dtype",
        choices=list(TORCH_NAMES),
        help="Precision of stored images: fp16 rounds a value by at most 1/2048 of itself, bf16 by 1/256; fp32 is "
        "exact and twice as large; text is stored in the run's precision (default: fp16).",
    )
    parser.add_argument(
        "--flips",
        action="store_true",
        help="Also store each image mirrored, at twice the size; always done if data.flip is not off.",
    )
    parser.add_argument(
        "--shard_pairs",
        type=count,
        default=1024,
        metavar="N",
        help="Pairs in a shard; a kill loses at most one unfinished shard of each rank (default: 1024).",
    )
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="Images in one pass of the VAE (default: 1 of 1024 x 1024 pixels); with --reference: pairs in one pass of "
        "the denoiser (default: 4 of 1024 x 1024 pixels).",
    )
    parser.add_argument("--verify", action="store_true", help="Check a finished cache, and write nothing.")
    parser.add_argument(
        "--verify_images",
        type=int,
        default=4,
        metavar="N",
        help="Number of pairs that --verify encodes or computes again to compare them; with 0, checking encoded pairs "
        "needs no dataset (default: 4).",
    )
    own, of_run = parser.parse_known_args(argv)
    _require_options_of_the_kind(own)
    return own, of_run


def _require_options_of_the_kind(own: argparse.Namespace) -> None:
    """Raise ConfigError for an option that has no effect on the kind of cache asked for."""
    ignored = ("store", "dtype", "flips") if own.reference else ("visits",)
    given = [f"--{name}" for name in ignored if getattr(own, name)]
    if given and own.reference:
        raise ConfigError(f"{given[0]} is for encoded images, but --reference stores only errors; leave it out")
    if given:
        raise ConfigError(f"{given[0]} needs --reference: it is the number of epochs whose errors are computed")


def default_folder(config: RunConfig, *, reference: bool) -> Path:
    """Return data.cache or reference.cache, or else output_dir with _cache or _reference added."""
    configured = config.reference.cache if reference else config.data.cache
    if configured is not None:
        return Path(configured).expanduser()
    folder = Path(config.output_dir)
    return folder.with_name(f"{folder.name}_{'reference' if reference else 'cache'}")


def main(argv: Sequence[str]) -> None:
    """Make or verify the cache that the arguments ask for."""
    own, of_run = parse_arguments(argv)
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    loaded = load_config(of_run)
    if loaded.dry_run:
        raise ConfigError("--dry_run is an option of ds_dpo/train.py; scripts/cache.py does not have it")
    if loaded.remarks and read_environment(os.environ).rank == 0:
        print(*loaded.remarks, sep="\n", flush=True)
    config = loaded.config
    from ds_dpo.engine.settings_file import deepspeed_config_path, precision_of_file, read_deepspeed_file

    precision = precision_of_file(read_deepspeed_file(deepspeed_config_path(config.deepspeed_config)))
    out = own.out or default_folder(config, reference=own.reference)
    verify = own.verify_images if own.verify else None
    # imported late: torch and DeepSpeed take ten seconds, and a mistyped option is reported at once
    if own.reference:
        from ds_dpo.reference.cache import program as reference_program

        options = reference_program.ReferenceOptions(
            config=config,
            precision=precision,
            out=out,
            visits=own.visits,
            shard_pairs=own.shard_pairs,
            batch_pairs=own.batch,
        )
        reference_program.run(options, verify=verify)
        return
    from ds_dpo.encoding.cache.plan import Request
    from ds_dpo.encoding.cache.program import run

    request = Request(
        config=config,
        text_dtype=precision,
        out=out,
        quantity=own.store or "moments",
        dtype=own.dtype or "fp16",
        mirrored=own.flips or config.data.flip != "off",
        shard_pairs=own.shard_pairs,
        images_at_once=own.batch,
    )
    run(request, verify=verify)
