"""Say whether a run fits its GPUs, how long it takes there, and which settings fit best; needs no GPU and no weights.

Traces the run's models on torch's meta device, which takes seconds, and adds up what a GPU holds for each ZeRO stage,
place of the reference, checkpointing and micro-batch. Takes the options of ds_dpo/train.py in addition to those below.
docs/plan.md says how far the figures can be trusted.

Examples:
    python scripts/plan.py --config sdxl_pickapic --gpus 16 --gpu a100-80
    python scripts/plan.py --config sdxl_pickapic_lora --gpus 1 --gpu 4090 --resolution 768
    python scripts/plan.py --config sdxl_pickapic --gpus 8 --gpu h100 --json --picture plan.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_dpo.config.program_options import count, program_parser, share, user_path
from ds_dpo.errors import ConfigError
from ds_dpo.planning.fit.gpus import DEFAULT_GPU, GPUS

DEFAULT_UTILIZATION = 0.35
DEFAULT_NETWORK_GBPS = 200


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's own options, and those of a run."""
    parser = program_parser("plan", __doc__)
    parser.add_argument("--gpus", type=count, default=8, metavar="N", help="Number of GPUs (default: 8).")
    parser.add_argument("--gpu", choices=list(GPUS), default=DEFAULT_GPU, help=f"Kind of GPU (default: {DEFAULT_GPU}).")
    parser.add_argument(
        "--utilization",
        type=share,
        default=DEFAULT_UTILIZATION,
        metavar="X",
        help=f"Share of the GPU's arithmetic that computing reaches (default: {DEFAULT_UTILIZATION}).",
    )
    parser.add_argument(
        "--network_gbps",
        type=count,
        default=DEFAULT_NETWORK_GBPS,
        metavar="N",
        help=f"Network of each GPU to other hosts, in gigabits per second (default: {DEFAULT_NETWORK_GBPS}).",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object, with every choice of settings.")
    parser.add_argument(
        "--picture", type=user_path, metavar="FILE", help="Also write a picture of memory by part (SVG)."
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Print the plan of a run."""
    own, of_run = parse_arguments(argv)
    if own.picture is not None and own.picture.suffix != ".svg":
        raise ConfigError(f"--picture {own.picture}: a name that ends in .svg would fit")
    from ds_dpo.config.load import load_config
    from ds_dpo.engine.settings import resolve_deepspeed

    config = load_config(of_run).config
    resolved = resolve_deepspeed(config, world_size=own.gpus)

    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    import json

    from ds_dpo.planning.fit.model_work import model_work
    from ds_dpo.planning.fit.plan import make_plan
    from ds_dpo.planning.fit.report import named_rows, plan_fields, plan_picture, plan_text
    from ds_dpo.planning.fit.step_time import Assumptions

    gpu = GPUS[own.gpu]
    assumed = Assumptions(utilization=own.utilization, network_bytes_per_second=own.network_gbps * 1e9 / 8)
    work = model_work(config, precision=resolved.precision)
    plan = make_plan(work, config, resolved, gpu, assumed)
    if own.json:
        print(json.dumps(plan_fields(plan, work, config, gpu, assumed)))
    else:
        print(plan_text(plan, work, config, gpu, assumed))
    if own.picture is not None:
        title = f"{config.model.pretrained} on {own.gpus} x {gpu.title}: memory of a GPU"
        _write(own.picture, plan_picture(named_rows(plan), gpu, title=title))


def _write(path: Path, text: str) -> None:
    from ds_dpo.storage.replace import replace_file

    try:
        replace_file(path, text, sync=False)
    except OSError as error:
        raise ConfigError(f"--picture {path} cannot be written: {error.strerror}") from error
