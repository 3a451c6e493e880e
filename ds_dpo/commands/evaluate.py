"""Compare a tuned miniature with its base, and with an SFT control, on prompts that are not trained on.

Each model draws the same prompts from the same noise, and the miniature's reward scores the images. Writes
OUT/summary.json and OUT/grid.png.

Examples:
    python scripts/evaluate.py --base ds_dpo://assets/miniature/model --tuned runs/miniature/export --out evaluation
    python scripts/evaluate.py --base BASE --tuned runs/dpo/export --sft runs/sft/export --out runs/dpo/evaluation
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_dpo.config.program_options import model_name, model_name_or_none, program_parser, user_path


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("evaluate", __doc__)
    model = "diffusers pipeline, or folder with only unet/"
    parser.add_argument(
        "--base", type=model_name, required=True, metavar="MODEL", help="Pipeline that training started from."
    )
    parser.add_argument("--tuned", type=model_name, required=True, metavar="MODEL", help=f"Model to evaluate: {model}.")
    parser.add_argument(
        "--sft",
        type=model_name_or_none,
        metavar="MODEL",
        help=f"Control, fine-tuned on preferred images alone: {model}.",
    )
    parser.add_argument(
        "--out", required=True, type=user_path, metavar="DIR", help="Folder for summary.json and grid.png."
    )
    parser.add_argument("--seeds", type=int, default=8, help="Number of images per prompt (default: 8).")
    parser.add_argument(
        "--first_seed",
        type=int,
        default=1_000_000,
        help="Seed of the first image; the next one adds 1 (default: 1000000).",
    )
    parser.add_argument("--steps", type=int, default=20, help="Number of DDIM steps (default: 20).")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="Classifier-free guidance scale (default: 1, which is off)."
    )
    parser.add_argument("--batch", type=int, default=24, help="Number of images drawn at once (default: 24).")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Compare the models that the arguments name."""
    arguments = parse_arguments(argv)
    from ds_dpo.process.quiet import quiet_libraries, quiet_output

    quiet_libraries()
    with quiet_output():  # libraries print what they lack when they are imported
        from ds_dpo.evaluation.miniature.compare import Request, evaluate
    evaluate(Request(**vars(arguments)))
