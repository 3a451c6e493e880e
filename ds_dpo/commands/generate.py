r"""Draw prompts with one or several models from the same noise, and put the images side by side.

A model is a diffusers pipeline (folder or hub id), an exported UNet, or a single .safetensors file. A UNet or a single
file is put into the pipeline --base. LoRAs can be added to each model. Writes OUT/images/, OUT/grid.png and
OUT/record.json.

Examples:
    python scripts/generate.py --model sdxl_dpo --prompt "a pelican riding a bicycle" --seed 0
    python scripts/generate.py --model stabilityai/stable-diffusion-xl-base-1.0 --model runs/mine/export \
        --prompts prompts.txt --seeds 0 1 2 --vae madebyollin/sdxl-vae-fp16-fix --out side_by_side
    python scripts/generate.py --model BASE --model BASE --lora my_lora.safetensors:0.8 --prompt "a red circle"
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_dpo.config.program_options import model_name, model_name_or_none, program_parser, user_path, word_or_none
from ds_dpo.precision import TORCH_NAMES


class AddModel(argparse.Action):
    """Collects models, each with its LoRAs, in the order of the command line."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, value: Any, option_string: str | None = None
    ) -> None:
        namespace.models = [*(namespace.models or []), (value, [])]


class AddLora(argparse.Action):
    """Adds a LoRA to the model named before it."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, value: Any, option_string: str | None = None
    ) -> None:
        if not namespace.models:
            parser.error(f"--lora {value} needs a --model before it, to which it is added")
        namespace.models[-1][1].append(value)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("generate", __doc__)
    add = parser.add_argument
    add(
        "--model",
        dest="models",
        action=AddModel,
        type=model_name,
        required=True,
        metavar="MODEL",
        help="Model that draws; repeat the option for more columns.",
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
        "--base",
        type=model_name_or_none,
        metavar="MODEL",
        help="Pipeline for UNets and single files (default: the first --model that is a pipeline).",
    )
    add(
        "--labels",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="Names of the models in the picture (default: from their paths).",
    )
    add(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="Prompt to draw; repeat the option for more rows.",
    )
    add(
        "--prompts",
        dest="prompt_file",
        type=user_path,
        metavar="FILE",
        help="File with a prompt per line, or .jsonl with prompt and seed.",
    )
    add(
        "--seed",
        "--seeds",
        dest="seeds",
        type=int,
        nargs="+",
        action="extend",
        metavar="N",
        help="Seeds of the noise (default: 0).",
    )
    add(
        "--out",
        "--output_dir",
        "--output-dir",
        type=user_path,
        default=Path("generated"),
        help="Folder to write (default: generated).",
    )
    add(
        "--steps",
        "--num_inference_steps",
        "--num-inference-steps",
        type=int,
        default=30,
        help="Sampling steps (default: 30).",
    )
    add(
        "--guidance",
        "--guidance_scale",
        "--guidance-scale",
        type=float,
        default=5.0,
        help="Guidance; 1 is off (default: 5).",
    )
    add("--resolution", type=int, help="Side of the images in pixels (default: that of the first model).")
    add("--batch", type=int, help="Number of images drawn at once (default: as many as make 1024 x 1024 pixels).")
    add("--dtype", choices=list(TORCH_NAMES), help="Precision (default: fp16, on a CPU fp32).")
    add("--device", default="auto", help="Device, such as cuda or cpu (default: an accelerator if there is one).")
    add(
        "--scheduler",
        choices=["model", "ddim", "euler", "dpmpp"],
        default="model",
        help="Sampler (default: the model's). For a flow model ddim and euler are its own Euler, and dpmpp is refused.",
    )
    add(
        "--vae",
        type=model_name_or_none,
        metavar="MODEL",
        help="VAE to use instead of the models' own, such as madebyollin/sdxl-vae-fp16-fix.",
    )
    add("--variant", type=word_or_none, help="Variant of the weights on the hub, such as fp16.")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Draw as the arguments ask."""
    arguments = vars(parse_arguments(argv))
    from ds_dpo.process.quiet import quiet_libraries, quiet_output

    quiet_libraries()
    with quiet_output():  # libraries print what they lack when they are imported
        from ds_dpo.evaluation.drawing.generate import Request, generate
        from ds_dpo.evaluation.drawing.named_model import ModelChoice, parse_lora
    models = [ModelChoice(name, tuple(map(parse_lora, loras))) for name, loras in arguments.pop("models")]
    lists: dict[str, Any] = {name: tuple(arguments.pop(name) or ()) for name in ("prompts", "seeds", "labels")}
    generate(Request(models=tuple(models), **{**lists, "seeds": lists["seeds"] or (0,)}, **arguments))
