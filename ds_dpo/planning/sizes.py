"""What a run's policy takes on each rank, and what each rank sends in a step: computed, before anything is loaded.

GB are 10^9 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ds_dpo.config.adapter_targets import is_target
from ds_dpo.config.asset_paths import PACKAGE, resolve_asset
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.models.weights.flux1_shapes import flux1_shapes
from ds_dpo.models.weights.flux2_shapes import flux2_shapes
from ds_dpo.models.weights.sd3_shapes import sd3_shapes
from ds_dpo.models.weights.unet_shapes import Shape, known_shapes

BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
# bytes of an element's moments; 8-bit ones have a scale for each 256 elements besides
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "lion": 4, "lion_8bit": 1}
MASTER_BYTES = 4
# by class of denoiser, as in models.families.table, which needs torch; a class that is not named is a UNet
SHAPES = {
    "SD3Transformer2DModel": sd3_shapes,
    "FluxTransformer2DModel": flux1_shapes,
    "Flux2Transformer2DModel": flux2_shapes,
}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of elements. total: of the denoiser, without low-rank layers. trained: those that get gradients."""

    total: int
    trained: int


def parameters_of(config: RunConfig) -> Parameters | None:
    """Count a run's parameters from the configuration of its denoiser; None if its shapes are not known here.

    A folder's own configuration counts. For a model of the hub and a single file it is that of the family, or of the
    model if its family has several sizes.
    """
    try:
        settings = denoiser_config(config.model.pretrained, config.model.family)
        shapes = SHAPES.get(settings.get("_class_name", ""), known_shapes)(settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # whoever loads the model says what is wrong with it
    if shapes is None:
        return None
    return Parameters(total=sum(map(math.prod, shapes.values())), trained=_trained(config, shapes))


def denoiser_config(pretrained: str, family: str) -> dict[str, Any]:
    """Return the settings of a denoiser: of its folder, of a known model of the hub, or of its family.

    Raises OSError, and ValueError or TypeError for a file that does not hold names and values.
    """
    own = own_denoiser_config(pretrained)
    return _usual_config(family) if own is None else own


def own_denoiser_config(pretrained: str) -> dict[str, Any] | None:
    """Return the settings of a denoiser: of its folder or of a known model of the hub; None if they are not known.

    Raises what denoiser_config does.
    """
    place, assets = Path(resolve_asset(pretrained)).expanduser(), PACKAGE / "assets"
    for path in (place / folder / "config.json" for folder in ("unet", "transformer")):
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
    by_name = json.loads((assets / "hub_denoisers.json").read_text(encoding="utf-8"))
    found = by_name.get(pretrained)  # settings, or the name of a family whose usual ones they are
    return _usual_config(found) if isinstance(found, str) else found


def _usual_config(family: str) -> dict[str, Any]:
    shipped = PACKAGE / "assets" / "model_configs" / family / "unet" / "config.json"
    return dict(json.loads(shipped.read_text(encoding="utf-8")))


def _trained(config: RunConfig, shapes: Mapping[str, Shape]) -> int:
    adapter, model = config.adapter, config.model
    if adapter.type == "none":
        chosen = [name for name in shapes if not model.train or _matches(name, model.train)]
        return sum(math.prod(shapes[name]) for name in chosen if not _matches(name, model.freeze))
    low_rank = 0
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) > 1 and is_target(layer, adapter.targets):
            rows, columns = shape[0], math.prod(shape[1:])
            low_rank += adapter.rank * (rows + columns) + (rows if adapter.type == "dora" else 0)
    return low_rank


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def model_bytes(
    parameters: Parameters,
    *,
    stage: int,
    ranks: int,
    weight_bytes: int = 2,
    gradient_bytes: int = 4,
    optimizer_bytes: int = MASTER_BYTES + MOMENT_BYTES["adamw"],
) -> float:
    """Return the bytes of weights, gradients and optimizer on each rank, nothing offloaded.

    ZeRO divides the optimizer among the ranks, from stage 2 on the gradients too, and at stage 3 the weights. At stage
    1 in bf16 DeepSpeed keeps each parameter's own 16-bit gradient beside the accumulated ones (bf16_optimizer.py).
    """
    weights, trained = parameters.total * weight_bytes, parameters.trained
    gradients = trained * (gradient_bytes if stage >= 2 else gradient_bytes + weight_bytes)
    optimizer = trained * optimizer_bytes / ranks
    return weights / (ranks if stage >= 3 else 1) + gradients / (ranks if stage >= 2 else 1) + optimizer


def optimizer_bytes(config: RunConfig) -> int:
    """Return the bytes of a trained parameter's master weight, moments and fp32 averages, all of which ZeRO divides."""
    averages = (config.ema.decay, config.reference.ema_decay)
    return MASTER_BYTES * (1 + sum(each is not None for each in averages)) + MOMENT_BYTES[config.optimizer.type]


def gradient_passes(stage: int, *, micro_batches: int, zero: Mapping[str, Any]) -> int:
    """Return how many times all gradients leave a rank in a step, each time but for the share of a rank.

    By ring algorithms an all-reduce of B bytes over N ranks sends 2 B (N - 1) / N, a reduction or a reduce-scatter half
    of it. Stage 1 reduces once a step. Stages 2 and 3 reduce in each micro-batch, which cannot wait: each rank keeps
    only its part. zero: the section zero_optimization of the engine's settings.
    """
    all_reduces = stage == 1 or (stage == 2 and zero.get("use_multi_rank_bucket_allreduce", True))
    return (2 if all_reduces else 1) * (1 if stage == 1 else micro_batches)


def sent_gradient_bytes(trained: int, resolved: ResolvedDeepSpeed) -> float:
    """Return the bytes of gradients that each rank sends in a step."""
    zero, ranks = resolved.settings["zero_optimization"], resolved.world_size
    element = BYTES_OF[resolved.settings.get("communication_data_type") or resolved.precision]
    passes = gradient_passes(resolved.stage, micro_batches=resolved.accumulation_steps, zero=zero)
    return passes * trained * element * (ranks - 1) / ranks


@dataclass(frozen=True)
class StateBytes:
    """Bytes on each rank: of weights, gradients and optimizer of the policy, and of the reference's copy."""

    policy: float
    reference: float

    @property
    def total(self) -> float:
        return self.policy + self.reference


def state_bytes(parameters: Parameters, config: RunConfig, resolved: ResolvedDeepSpeed) -> StateBytes:
    """Return what a run's states take on each rank, offloaded ones among them."""
    weight_bytes = BYTES_OF[resolved.precision]
    held = model_bytes(
        parameters,
        stage=resolved.stage,
        ranks=resolved.world_size,
        weight_bytes=weight_bytes,
        gradient_bytes=BYTES_OF[resolved.accumulation_precision],
        optimizer_bytes=optimizer_bytes(config),
    )
    copies = {"replicated": 1.0, "zero3": 1 / resolved.world_size}.get(config.reference.residency, 0.0)
    copies = 0.0 if config.objective.reference_need == "none" else copies
    return StateBytes(policy=held, reference=parameters.total * weight_bytes * copies)


def describe_sizes(config: RunConfig, resolved: ResolvedDeepSpeed) -> list[str]:
    """Return a line on memory and one on the network; none if the denoiser is not known."""
    parameters = parameters_of(config)
    if parameters is None:
        return []
    states = state_bytes(parameters, config, resolved)
    offloaded = resolved.offloads_optimizer or resolved.offloads_parameters
    lines = [
        f"memory of a rank: {gb(states.total)} for weights, gradients and optimizer"
        + (f", {gb(states.reference)} of it for the reference" if states.reference else "")
        + ("; part of it is in host memory, as offloaded" if offloaded else "")
        + "; activations, encoders and buffers come on top"
    ]
    if resolved.world_size > 1:
        how = "once a step" if resolved.stage == 1 else f"in each of {resolved.accumulation_steps} micro-batches"
        sent = sent_gradient_bytes(parameters.trained, resolved)
        lines.append(f"gradients: {gb(sent)} a step over the network from each rank (reduced {how})")
    return lines


def gb(number: float) -> str:
    """Return bytes in words, in GB of 10^9."""
    return f"{number / 1e9:.3g} GB"
