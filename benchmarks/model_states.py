#!/usr/bin/env python
"""Compute what weights, gradients and optimizer state take on each GPU; nothing is measured and nothing is loaded.

    python benchmarks/model_states.py

Prints the first table of docs/memory.md and, as its last line, one JSON object with the parameter counts. GB are 10**9
bytes. Activations, encoders and the buffers of CUDA and DeepSpeed come on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_dpo.models.weights.unet_shapes import Shape, known_shapes
from ds_dpo.planning.sizes import Parameters, model_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "ds_dpo" / "assets" / "model_configs"
UNETS = {"SDXL, SDXL-Turbo": "sdxl", "SDXL refiner": "sdxl_refiner", "SD 1.5": "sd15", "SD 2.1": "sd21"}
NUMBERS_OF_GPUS = (1, 8, 16, 64)
WEIGHT_BYTES = 2  # bf16 or fp16
LORA_LAYERS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


def unet_shapes(family: str) -> Mapping[str, Shape]:
    """Return the shapes of a family's UNet by parameter name."""
    config = json.loads((CONFIGS / family / "unet" / "config.json").read_text(encoding="utf-8"))
    shapes = known_shapes(config)
    assert shapes is not None, "the shipped configurations are known"
    return shapes


def num_parameters(family: str) -> int:
    return sum(math.prod(shape) for shape in unet_shapes(family).values())


def num_lora_parameters(family: str, *, rank: int) -> int:
    """Return the parameters of a LoRA on all attention layers, as the preset sdxl_pickapic_lora has them."""
    shapes = unet_shapes(family).items()
    return rank * sum(sum(shape) for name, shape in shapes if name.endswith(LORA_LAYERS))


def policy_bytes(parameters: int, *, stage: int, gpus: int) -> float:
    """Return the bytes of a policy on each GPU: ZeRO divides the optimizer state, then gradients, then weights."""
    return model_bytes(Parameters(total=parameters, trained=parameters), stage=stage, ranks=gpus)


def lora_bytes(family: str, *, rank: int) -> float:
    """Return the bytes of a frozen UNet and of a LoRA that one GPU trains; the reference is the UNet without it."""
    trained = num_lora_parameters(family, rank=rank)
    frozen = WEIGHT_BYTES * num_parameters(family)
    return frozen + model_bytes(Parameters(total=trained, trained=trained), stage=1, ranks=1)


def table() -> Iterator[str]:
    """Yield docs/memory.md's table of the policy and of a replicated reference, in GB."""
    yield "| UNet | parameters | GPUs | ZeRO-1 | ZeRO-2 | ZeRO-3 | a replicated reference adds |"
    yield "|---|---|---|---|---|---|---|"
    for title, family in UNETS.items():
        parameters = num_parameters(family)
        for gpus in NUMBERS_OF_GPUS:
            stages = [policy_bytes(parameters, stage=stage, gpus=gpus) for stage in (1, 2, 3)]
            cells = [f"{value / 1e9:.1f}" for value in [*stages, WEIGHT_BYTES * parameters]]
            yield f"| {title} | {parameters:,} | {gpus} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
    counts: dict[str, int] = {family: num_parameters(family) for family in UNETS.values()}
    counts["sdxl_lora_rank_8"] = num_lora_parameters("sdxl", rank=8)
    print(json.dumps(counts))
