r"""Draw prompts with one or several models from the same noise, and put the images side by side.

A model is a diffusers pipeline (folder or hub id), an export of a UNet alone or of a single .safetensors file, which
are taken into --base, each with LoRAs over it. Writes OUT/images/, OUT/grid.png and OUT/record.json.

Examples:
    python scripts/generate.py --model sdxl_dpo --prompt "a pelican riding a bicycle" --seed 0
    python scripts/generate.py --model stabilityai/stable-diffusion-xl-base-1.0 --model runs/mine/export \
        --prompts prompts.txt --seeds 0 1 2 --vae madebyollin/sdxl-vae-fp16-fix --out side_by_side
    python scripts/generate.py --model BASE --model BASE --lora my_lora.safetensors:0.8 --prompt "a red circle"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.errors import run_program
from ds_dpo.precision import TORCH_NAMES


class AddModel(argparse.Action):
    """Collects (model, its LoRAs) in the order of the command line."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        namespace.models = [*(namespace.models or []), (value, [])]


class AddLora(argparse.Action):
    """Gives a LoRA to the model named before it."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        if not namespace.models:
            parser.error(f"--lora {value}: goes over the --model named before it; name that first")
        namespace.models[-1][1].append(value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        dest="models",
        action=AddModel,
        required=True,
        metavar="MODEL",
        help="what draws; again for a further column",
    )
    add("--lora", dest="models", action=AddLora, metavar="FILE[:SCALE]", help="LoRA over the --model before it")
    add(
        "--base", metavar="MODEL", help="pipeline around UNets and single files; default: the first --model that is one"
    )
    add(
        "--labels",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="the models' names in the picture; default: from their paths",
    )
    add(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to draw; again for a further row",
    )
    add("--prompts", dest="prompt_file", type=Path, metavar="FILE", help="a prompt a line, or .jsonl: prompt and seed")
    add(
        "--seed",
        "--seeds",
        dest="seeds",
        type=int,
        nargs="+",
        action="extend",
        metavar="N",
        help="of the noise; default: 0",
    )
    add(
        "--out", "--output_dir", "--output-dir", type=Path, default=Path("generated"), help="folder; default: generated"
    )
    add("--steps", "--num_inference_steps", "--num-inference-steps", type=int, default=30, help="default: 30")
    add("--guidance", "--guidance_scale", "--guidance-scale", type=float, default=5.0, help="1: none; default: 5")
    add("--resolution", type=int, help="side of the images, pixels; default: the first model's own")
    add("--batch", type=int, help="images drawn at once; default: what fits 1024 x 1024 pixels")
    add("--dtype", choices=list(TORCH_NAMES), help="default: fp16, on a CPU fp32")
    add("--device", default="auto", help="such as cuda or cpu; default: an accelerator where there is one")
    add("--scheduler", choices=["model", "ddim", "euler", "dpmpp"], default="model", help="default: the model's own")
    add("--vae", metavar="MODEL", help="in place of the models' own, such as madebyollin/sdxl-vae-fp16-fix")
    add("--variant", help="of the weights, such as fp16, where the hub has several")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    from ds_dpo.process.quiet import quiet_libraries, quiet_output

    quiet_libraries()
    with quiet_output():  # libraries announce what they lack as they are imported
        from ds_dpo.evaluation.drawing.generate import Request, generate
        from ds_dpo.evaluation.drawing.named_model import ModelChoice, parse_lora
    models = [ModelChoice(name, tuple(map(parse_lora, loras))) for name, loras in arguments.pop("models")]
    lists = {name: tuple(arguments.pop(name) or ()) for name in ("prompts", "seeds", "labels")}
    generate(Request(models=tuple(models), **{**lists, "seeds": lists["seeds"] or (0,)}, **arguments))


if __name__ == "__main__":
    run_program(main)
