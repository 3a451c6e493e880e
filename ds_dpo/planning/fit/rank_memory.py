"""The bytes that a rank holds, by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.planning.fit.choices import Choice
from ds_dpo.planning.fit.model_work import ModelWork
from ds_dpo.planning.sizes import BYTES_OF, Parameters, model_bytes, optimizer_bytes, state_bytes
from ds_dpo.precision import Precision

# what CUDA, cuBLAS, cuDNN and NCCL take for themselves: assumed
CONTEXT_BYTES = 1.5e9
OFFLOAD_SLOT_BYTES = 2 * 256 * 2**20  # of reference.block_offload, which is in a higher layer
BUCKET_ELEMENTS = 5e8  # DeepSpeed's own, where a file sets none
LIVE_ELEMENTS = 1e9
PARTS = ("weights", "gradients", "optimizer", "reference", "encoders", "activations", "buffers", "context")


def rank_memory(
    work: ModelWork,
    choice: Choice,
    config: RunConfig,
    *,
    ranks: int,
    precision: Precision,
    accumulation_precision: Precision,
    zero: Mapping[str, Any],
) -> dict[str, float]:
    """Return the bytes on the device of a rank at the fullest moment of a step, by PARTS; nothing offloaded.

    zero: the section zero_optimization of the DeepSpeed settings, for its buckets. Encoding, the reference's pass and
    the policy's passes come one after another, so that the largest of them counts.
    """
    weight, gradient = BYTES_OF[precision], BYTES_OF[accumulation_precision]
    parameters = Parameters(total=work.parameters, trained=work.trained_parameters)
    weights = work.parameters * weight / (ranks if choice.stage == 3 else 1)
    optimizer = work.trained_parameters * optimizer_bytes(config) / ranks
    states = model_bytes(
        parameters,
        stage=choice.stage,
        ranks=ranks,
        weight_bytes=weight,
        gradient_bytes=gradient,
        optimizer_bytes=optimizer_bytes(config),
    )
    has_encoders = config.data.cache is None or config.cadence.sample_every_steps is not None
    passes = [work.policy[choice.checkpointing].peak_bytes * choice.micro_batch_pairs]
    if choice.residency in ("replicated", "zero3", "cpu", "adapter"):
        passes.append(work.reference.peak_bytes * choice.micro_batch_pairs)
    if config.data.cache is None and work.vae is not None:
        passes.append(work.vae.peak_bytes)
    return {
        "weights": weights,
        "gradients": states - weights - optimizer,
        "optimizer": optimizer,
        "reference": _reference(work.parameters * weight, choice, ranks),
        "encoders": work.vae_bytes + work.text_bytes if has_encoders else 0.0,
        "activations": max(passes),
        "buffers": _buffers(parameters, choice.stage, zero, gradient_bytes=gradient, weight_bytes=weight, ranks=ranks),
        "context": CONTEXT_BYTES,
    }


def _reference(copy_bytes: float, choice: Choice, ranks: int) -> float:
    return {
        "replicated": copy_bytes,
        "zero3": copy_bytes / ranks,
        "cpu": float(min(OFFLOAD_SLOT_BYTES, copy_bytes)),
    }.get(choice.residency, 0.0)


def bytes_to_come(parameters: Parameters, config: RunConfig, resolved: ResolvedDeepSpeed) -> float:
    """Return the bytes that a rank takes after its models are loaded and before its first pass.

    These are gradients, states of the optimizer, and buffers, as if nothing was offloaded.
    """
    weight, gradient = BYTES_OF[resolved.precision], BYTES_OF[resolved.accumulation_precision]
    weights = parameters.total * weight / (resolved.world_size if resolved.stage == 3 else 1)
    buffers = _buffers(
        parameters,
        resolved.stage,
        resolved.settings["zero_optimization"],
        gradient_bytes=gradient,
        weight_bytes=weight,
        ranks=resolved.world_size,
    )
    return state_bytes(parameters, config, resolved).policy - weights + buffers


def _buffers(
    parameters: Parameters,
    stage: int,
    zero: Mapping[str, Any],
    *,
    gradient_bytes: int,
    weight_bytes: int,
    ranks: int,
) -> float:
    """Return DeepSpeed's buckets: one in which gradients are reduced, two if it overlaps, and gathered weights."""
    bucket = min(zero.get("reduce_bucket_size", BUCKET_ELEMENTS), parameters.trained)
    reducing = bucket * gradient_bytes * (2 if zero.get("overlap_comm") else 1) if ranks > 1 else 0.0
    gathered = zero.get("allgather_bucket_size", BUCKET_ELEMENTS)
    if stage == 3:
        gathered = zero.get("stage3_max_live_parameters", LIVE_ELEMENTS)
    gathering = min(gathered, parameters.total if stage == 3 else parameters.trained) * weight_bytes
    return float(reducing + (gathering if ranks > 1 else 0.0))
