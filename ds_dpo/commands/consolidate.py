"""Turn the ZeRO shards of a run into a model that other programs load. Needs neither a GPU nor DeepSpeed.

Examples:
    python scripts/consolidate.py runs/my_run my_model
    python scripts/consolidate.py runs/my_run my_model --format pipeline --dtype bf16 --step 200
    python scripts/consolidate.py runs/my_run tuned.safetensors --format single-file --base_file base.safetensors
    python scripts/consolidate.py runs/my_run my_lora --format lora --rank 64

Options may be written with - or _. docs/export.md says which format each program needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_dpo.config.program_options import model_name_or_none, program_parser, user_path, word_or_none
from ds_dpo.precision import TORCH_NAMES


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    from ds_dpo.export.request import ALL_TARGETS, FORMAT_OPTIONS, LORA_NAMINGS, LORA_TARGETS, format_name, step_or_best

    parser = program_parser("consolidate", __doc__)
    parser.add_argument(
        "source", type=user_path, help="Run folder, one of its checkpoints, or a save_dir of DeepSpeed."
    )
    parser.add_argument(
        "out", type=user_path, help="Folder or .safetensors file to write; an earlier export is replaced."
    )
    parser.add_argument(
        "--format",
        type=format_name,
        choices=list(FORMAT_OPTIONS),
        default="denoiser",
        help="What to write (default: denoiser; unet means the same).",
    )
    parser.add_argument(
        "--step",
        type=step_or_best,
        metavar="N",
        help="Step of the checkpoint to export, or best for the one that cadence.keep_best marks (default: the newest "
        "valid one).",
    )
    parser.add_argument(
        "--dtype",
        choices=list(TORCH_NAMES),
        default="fp16",
        help="Precision to round the fp32 weights to (default: fp16).",
    )
    parser.add_argument(
        "--base",
        type=model_name_or_none,
        metavar="MODEL",
        help="Folder or hub id of the base model (default: the run's).",
    )
    parser.add_argument(
        "--ema", action="store_true", help="Export the moving average of the weights; the run needs ema.decay."
    )
    parser.add_argument(
        "--keys", metavar="PREFIX", help="Prefix of the denoiser's parameters in the shards, such as unet."
    )
    folder = parser.add_argument_group("denoiser, pipeline")
    folder.add_argument(
        "--variant",
        type=word_or_none,
        metavar="NAME",
        help="Name the files for from_pretrained(variant=NAME), such as fp16.",
    )
    folder.add_argument("--max_shard_gb", type=float, metavar="GB", help="Largest size of a file (default: 10).")
    folder.add_argument(
        "--vae", type=model_name_or_none, metavar="MODEL", help="Folder or hub id of a VAE to put into the pipeline."
    )
    single = parser.add_argument_group("single-file")
    single.add_argument("--base_file", type=user_path, metavar="FILE", help="Checkpoint file to put the denoiser into.")
    lora = parser.add_argument_group("lora")
    lora.add_argument("--rank", type=int, help="Rank of the LoRA that approximates the change of a full run.")
    lora.add_argument(
        "--lora_naming", choices=LORA_NAMINGS, default="diffusers", help="Names of its weights (default: diffusers)."
    )
    lora.add_argument(
        "--lora_targets",
        choices=list(LORA_TARGETS),
        default=ALL_TARGETS,
        help="Layers of a LoRA that approximates a full run: all, or those of attention blocks (default: all).",
    )
    lora.add_argument(
        "--lora_alpha", type=float, help="Alpha of a LoRA run without adapter_config.json, in any format."
    )
    hub = parser.add_argument_group("model card and hub")
    hub.add_argument(
        "--license", metavar="ID", help="License in the model card (default: that of the base, if it is known)."
    )
    hub.add_argument("--push_to_hub", metavar="OWNER/NAME", help="Upload the folder to this repository of the hub.")
    hub.add_argument("--private", action="store_true", help="Make the new repository private.")
    return parser.parse_args([_with_underscores(argument) for argument in argv])


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def main(argv: Sequence[str]) -> None:
    """Export as the arguments ask."""
    arguments = parse_arguments(argv)
    from ds_dpo.export.consolidate import consolidate
    from ds_dpo.export.request import Request
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    consolidate(Request(**vars(arguments)))
