r"""Make preference pairs of a model's own images: draw several for each prompt, score them, pair them.

Takes the options of scripts/evaluate.py (see its --help) in addition to those below: --seeds N draws N images of each
prompt. Writes what that program writes, the page too, and OUT/pairs.parquet, on which a run trains. Each row has the
seeds and the noise from which its images were drawn. The same command continues after a kill; another --pairs or
--least_margin draws and scores nothing again.

Examples:
    deepspeed --num_gpus 8 scripts/make_pairs.py --model BASE --prompts prompts.txt --seeds 8 --scorer pickscore \
        --pairs best_worst --out pairs/round_1
    python scripts/make_pairs.py --model TUNED --model BASE --labels tuned base --pairs against --against base \
        --prompts prompts.txt --seeds 8 --scorer pickscore clip --out pairs/against
    deepspeed ds_dpo/train.py --config sdxl_pickapic --dataset pairs/round_1/pairs.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_dpo.commands import evaluate
from ds_dpo.config.program_options import margin, program_parser
from ds_dpo.errors import ConfigError


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's own options, and those of the evaluation."""
    parser = program_parser("make-pairs", __doc__)
    parser.add_argument(
        "--pairs",
        choices=["best_worst", "all", "against"],
        default="best_worst",
        help="Which images become pairs. best_worst: the best and the worst image of each prompt. all: each two "
        "images. against: the best image and the image of the same seed by the model --against (default: best_worst).",
    )
    parser.add_argument(
        "--least_margin",
        type=margin,
        default=0.0,
        metavar="X",
        help="Leave out pairs whose scores differ by less. A score is measured in standard deviations of its scorer "
        "over all images, and several scorers by their mean (default: 0).",
    )
    return parser.parse_known_args(argv)


def _require_what_the_rule_needs(rule: str, arguments: argparse.Namespace) -> None:
    """Raise ConfigError if the images that are to be drawn give no pair; form_pairs sees the same, but later."""
    if rule != "against" and arguments.seeds == 1:
        raise ConfigError(f"--pairs {rule}: --seeds 1 draws one image of each prompt; give 2 or more")
    if rule == "against" and (arguments.against is None or len(arguments.models) < 2):
        raise ConfigError("--pairs against: needs two models, one of them named by --against; give both")


def main(argv: Sequence[str]) -> None:
    """Draw, score and pair as the arguments ask."""
    own, of_evaluation = parse_arguments(argv)
    arguments = evaluate.parse_arguments(of_evaluation)
    if arguments.votes:
        raise ConfigError("--votes is an option of scripts/evaluate.py; scripts/make_pairs.py does not have it")
    if not arguments.models:
        raise ConfigError("--model is missing: give the model that draws")
    _require_what_the_rule_needs(own.pairs, arguments)
    request, results = evaluate.run(arguments)
    if results is None:  # rank 0 alone has them
        return
    from ds_dpo.feedback.pairs.program import PairRequest, make_pairs

    asked = PairRequest(
        out=request.out,
        rule=own.pairs,
        least_margin=own.least_margin,
        models=request.models,
        vae=request.vae,
        variant=request.variant,
        against=request.against,
    )
    make_pairs(asked, results, say=print)
