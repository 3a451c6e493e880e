"""Encode the images and prompts of a run's pairs once, or compute the errors of its reference, for training to read.

Takes the run's own options (ds_dpo/train.py --help) beside those below. Each distinct image and each distinct prompt is
encoded once, on any number of ranks; the same command again goes on where it was killed. Then train with
--data.cache FOLDER and the same options. With --reference, the frozen reference's two errors of each pair in each visit
are computed instead: train with --reference.residency cached --reference.cache FOLDER, and no reference is in memory.

    deepspeed --num_gpus 8 scripts/cache.py --config sdxl_pickapic --out caches/pickapic
    python scripts/cache.py --config miniature --out runs/cache --dtype fp32
    python scripts/cache.py --config sdxl_pickapic --out caches/pickapic --verify
    deepspeed --num_gpus 8 scripts/cache.py --reference --config sdxl_pickapic --out caches/reference
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError, run_program
from ds_dpo.precision import TORCH_NAMES


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's own options, and the run's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: data.cache, else beside output_dir, with _cache added; with --reference: reference.cache, else "
        "with _reference added",
    )
    parser.add_argument("--reference", action="store_true", help="compute the reference's errors; encode nothing")
    parser.add_argument(
        "--visits",
        type=_positive,
        metavar="N",
        help="with --reference: all pairs in so many visits (epochs); default: those that max_train_steps steps meet",
    )
    parser.add_argument(
        "--store",
        choices=["moments", "mean"],
        help="of each image: mean and log-variance, so that each visit draws its own latent, or the mean alone, half "
        "the size; default: moments",
    )
    parser.add_argument(
        "--dtype",
        choices=list(TORCH_NAMES),
        help="of what is stored of images; fp16 rounds a value by at most 1/2048 of itself, bf16 by 1/256, fp32 is "
        "exact and twice the size; text is stored as it is encoded; default: fp16",
    )
    parser.add_argument(
        "--flips",
        action="store_true",
        help="store each image mirrored too, twice the size; always done where data.flip is not off, which needs it",
    )
    parser.add_argument(
        "--shard_pairs",
        type=_positive,
        default=1024,
        metavar="N",
        help="pairs of a shard, with --reference in one visit; a kill loses at most one of each rank; default: 1024",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        metavar="N",
        help="images that pass the VAE at once, default: 1 of 1024 x 1024 pixels; with --reference: pairs that pass "
        "the UNet at once, default: 4 of 1024 x 1024 pixels",
    )
    parser.add_argument("--verify", action="store_true", help="look through a finished cache; writes nothing")
    parser.add_argument(
        "--verify_images",
        type=int,
        default=4,
        metavar="N",
        help="pairs that --verify encodes, or computes, again and compares, 0 encoded need no dataset; default: 4",
    )
    own, of_run = parser.parse_known_args(argv)
    _require_options_of_the_kind(own)
    return own, of_run


def _require_options_of_the_kind(own: argparse.Namespace) -> None:
    """Raise ConfigError for an option that what is made would ignore."""
    ignored = ("store", "dtype", "flips") if own.reference else ("visits",)
    given = [f"--{name}" for name in ignored if getattr(own, name)]
    if given and own.reference:
        raise ConfigError(f"{given[0]} says how images are stored, and --reference stores errors alone; leave it out")
    if given:
        raise ConfigError(f"{given[0]} says of how many visits --reference computes errors; encoding has none")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; 1 or more would fit")
    return value


def default_folder(config: RunConfig, *, reference: bool) -> Path:
    """Return data.cache or reference.cache, or else output_dir with _cache or _reference added."""
    configured = config.reference.cache if reference else config.data.cache
    if configured is not None:
        return Path(configured).expanduser()
    folder = Path(config.output_dir)
    return folder.with_name(f"{folder.name}_{'reference' if reference else 'cache'}")


def main(argv: Sequence[str] | None = None) -> None:
    own, of_run = parse_arguments(sys.argv[1:] if argv is None else argv)
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    loaded = load_config(of_run)
    if loaded.dry_run:
        raise ConfigError("option --dry_run is ds_dpo/train.py's; scripts/cache.py has none")
    config = loaded.config
    from ds_dpo.engine.settings_file import deepspeed_config_path, precision_of_file, read_deepspeed_file

    precision = precision_of_file(read_deepspeed_file(deepspeed_config_path(config.deepspeed_config)))
    out = own.out or default_folder(config, reference=own.reference)
    verify = own.verify_images if own.verify else None
    # with torch and DeepSpeed it takes ten seconds to import what follows; a mistyped option is told at once
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


if __name__ == "__main__":
    run_program(main)
