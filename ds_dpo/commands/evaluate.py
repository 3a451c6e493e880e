r"""Compare models on the same prompts and seeds, by any scorers: win rates with intervals, and a page to look at.

A model is a diffusers pipeline (folder or hub id), an exported UNet, a single .safetensors file, or a run: RUN is its
newest valid checkpoint, RUN@200 that of step 200, RUN@best the one that cadence.keep_best marks. A UNet or a single
file is put into the first model that is a whole pipeline. Writes OUT/page.html, OUT/summary.json, .csv and .md, and
TensorBoard's curves. The same command continues after a kill; with more models, prompt sets or scorers it draws and
scores only what is missing. Runs on any number of ranks. docs/evaluation.md describes prompt sets and figures.

Examples:
    python scripts/evaluate.py --model stabilityai/stable-diffusion-xl-base-1.0 --model runs/mine/export \
        --prompts parti --scorer pickscore clip --out evaluation
    deepspeed --num_gpus 8 scripts/evaluate.py --model BASE --model TUNED --prompts hpsv2 prompts.txt \
        --scorer pickscore --out evaluation
    python scripts/evaluate.py --base BASE --tuned runs/dpo/export --sft runs/sft/export --out runs/dpo/evaluation
    python scripts/evaluate.py --out evaluation --votes votes-anna.jsonl votes-ben.jsonl

The third form compares miniatures by their reward, on their own prompts. The last one counts blind votes, which people
give on OUT/page.html.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_dpo.commands.generate import AddLora, AddModel
from ds_dpo.config.objectives import SftConfig
from ds_dpo.config.program_options import model_name, model_name_or_none, program_parser, user_path, word_or_none
from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.scorers.table import SCORERS
from ds_dpo.precision import TORCH_NAMES, Precision

if TYPE_CHECKING:
    from ds_dpo.evaluation.results import Results
    from ds_dpo.evaluation.run.request import Request

SFT = SftConfig.name()
# of the first form of this command: the labels of its models in their order, and what they are
ROLES = {
    "base": "Model with the label base; it comes first.",
    SFT: f"Model with the label {SFT}, a control that was fine-tuned on preferred images alone.",
    "tuned": "Model with the label tuned.",
}
MINIATURE_SET, MINIATURE_SCORER = "miniature", "reward"
MISSING = {
    "prompts": "--prompts is missing: give at least one set, such as parti or prompts.txt",
    "scorers": f"--scorer is missing: give at least one of {', '.join(SCORERS)}, or the name of a plugin",
}


class AddRefiner(argparse.Action):
    """Gives the model named before it a refiner, as the third part of its entry."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        if not namespace.models or len(namespace.models[-1]) > 2:
            parser.error(f"--refiner {value} needs a --model before it, one refiner for each")
        namespace.models[-1] = (*namespace.models[-1], value)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("evaluate", __doc__)
    _add_models(parser)
    add = parser.add_argument
    add(
        "--prompts",
        nargs="+",
        action="extend",
        metavar="SET",
        help="Prompt sets: parti, hpsv2, pickapic_test, geneval, miniature, a file (.txt, .jsonl, .json, .tsv, .csv, "
        ".parquet), a folder with a file for each category, or NAME=FILE.",
    )
    add(
        "--scorer",
        "--scorers",
        dest="scorers",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="Scorers: NAME, NAME=SOURCE, or a .yaml file (docs/scorers.md).",
    )
    add("--out", required=True, type=user_path, metavar="DIR", help="Folder to write, or to continue.")
    add(
        "--trained_on",
        nargs="+",
        action="extend",
        default=[],
        metavar="SCORER",
        help="Scorers that made the training's labels; the report warns if one of them judges.",
    )
    add(
        "--votes",
        nargs="+",
        action="extend",
        type=user_path,
        default=[],
        metavar="FILE",
        help="Vote files that DIR/page.html exports: print the win rate by people, and how well raters and scorers "
        "agree. Without --model, nothing is drawn or scored.",
    )
    _add_settings(parser)
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher gives it
    arguments = parser.parse_args(argv)
    _complete(arguments)
    return arguments


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        dest="models",
        action=AddModel,
        type=model_name,
        metavar="MODEL",
        help="Model to evaluate; repeat the option for more of them.",
    )
    add(
        "--lora",
        dest="models",
        action=AddLora,
        type=model_name,
        metavar="FILE[:SCALE]",
        help="LoRA added to the --model before it.",
    )
    add(
        "--refiner",
        dest="models",
        action=AddRefiner,
        type=model_name,
        metavar="MODEL",
        help="Refiner of SDXL that finishes the images of the --model before it.",
    )
    add(
        "--labels",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="Names of the models in all tables, one for each --model (default: from their paths).",
    )
    add("--against", metavar="LABEL", help="Model that the others are compared with (default: the first one).")
    for role, words in ROLES.items():
        add(f"--{role}", type=model_name_or_none if role == SFT else model_name, metavar="MODEL", help=words)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    drawing = parser.add_argument_group(
        "drawing", "One that is left out is that of the folder's first call, or the default."
    )
    add = drawing.add_argument
    add("--seeds", type=int, metavar="N", help="Images of each prompt (default: 1; 8 for the miniature).")
    add(
        "--first_seed",
        type=int,
        metavar="N",
        help="The image number K of the prompt at place P has seed N + P * seeds + K (default: 1000000).",
    )
    add("--steps", type=int, metavar="N", help="Sampling steps (default: 30; 20 for the miniature).")
    add("--guidance", type=float, metavar="X", help="Guidance; 1 is off (default: 5; 1 for the miniature).")
    add("--resolution", type=int, metavar="N", help="Side of the images in pixels (default: the first model's own).")
    add(
        "--scheduler",
        choices=["model", "ddim", "euler", "dpmpp"],
        help="Sampler (default: the model's own; ddim for the miniature).",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="Number of images drawn at once (default: as many as make 1024 x 1024 pixels, at most 24).",
    )
    add("--dtype", choices=list(TORCH_NAMES), help="Precision (default: fp16, on a CPU fp32).")
    add("--vae", type=model_name_or_none, metavar="MODEL", help="VAE to use instead of the models' own.")
    add("--variant", type=word_or_none, help="Variant of the weights on the hub, such as fp16.")
    add(
        "--device",
        default="auto",
        help="Device, such as cuda or cpu (default: an accelerator for each rank if there is one).",
    )


def _complete(arguments: argparse.Namespace) -> None:
    """Add the models of the first form, and what it means if no prompts or scorers are given.

    Raises ConfigError for what is missing.
    """
    if arguments.votes and not any([arguments.models, arguments.prompts, arguments.scorers, arguments.base]):
        return
    models = arguments.models or []
    in_roles = [(role, getattr(arguments, role)) for role in ROLES if getattr(arguments, role) is not None]
    if in_roles and not (arguments.base and (arguments.tuned or models)):
        raise ConfigError("--base, --tuned: give both, or give --model for each model")
    if not models and not in_roles:
        raise ConfigError("--model is missing: give one for each model to compare")
    if arguments.labels and len(arguments.labels) != len(models):
        raise ConfigError(f"--labels: {len(arguments.labels)} labels for {len(models)} --model; give one for each")
    arguments.models = [(name, []) for _, name in in_roles] + models
    arguments.labels = [role for role, _ in in_roles] + (arguments.labels or [None] * len(models))
    for name, default in (("prompts", MINIATURE_SET), ("scorers", MINIATURE_SCORER)):
        given = getattr(arguments, name) or ([default] if in_roles else None)
        if given is None:
            raise ConfigError(MISSING[name])
        setattr(arguments, name, given)


def main(argv: Sequence[str]) -> None:
    """Evaluate as the arguments ask."""
    arguments = parse_arguments(argv)
    if arguments.models:
        run(arguments)
    if arguments.votes and os.environ.get("RANK", "0") == "0":
        from ds_dpo.evaluation.run.human_votes import count_votes

        count_votes(arguments.out, arguments.votes, say=print)


def run(arguments: argparse.Namespace) -> tuple[Request, Results | None]:
    """Evaluate as parsed arguments ask; returns what was asked, and on rank 0 the results."""
    given = {name: value for name, value in vars(arguments).items() if name not in (*ROLES, "votes", "local_rank")}
    from ds_dpo.evaluation.scorers.choice import read_choices

    scorers = read_choices(given.pop("scorers"))
    from ds_dpo.process.quiet import quiet_libraries, quiet_output

    quiet_libraries()
    with quiet_output():  # libraries print what they lack when they are imported
        from ds_dpo.evaluation.drawing.named_model import ModelChoice, parse_lora
        from ds_dpo.evaluation.run.program import evaluate
        from ds_dpo.evaluation.run.request import Request
    models = [
        ModelChoice(name, tuple(map(parse_lora, loras)), *refiner) for name, loras, *refiner in given.pop("models")
    ]
    lists: dict[str, Any] = {name: tuple(given.pop(name)) for name in ("labels", "prompts", "trained_on")}
    request = Request(models=tuple(models), scorers=scorers, **lists, **given)
    return request, evaluate(request, export=_export)


def _export(checkpoint: Path, folder: Path, dtype: Precision) -> None:
    from ds_dpo.export.consolidate import consolidate
    from ds_dpo.export.request import Request

    request = Request(source=checkpoint, out=folder, format="pipeline", dtype=dtype)
    consolidate(request, say=lambda line: None)  # evaluate says what it exports
