"""What sets two calls of a module apart that read the same and compute something else, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TensorLook:
    """What chooses a kernel in a tensor. alignment: bytes. content: a sum over its values; None if not compared."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    alignment: int
    content: int | None


@dataclass(frozen=True, kw_only=True)
class ModuleLook:
    """A call of a module. kind: its class. tensors: inputs and own weights by name. outputs: on the host.

    processor: the class that computes its attention, if it has one.
    """

    kind: str
    tensors: dict[str, TensorLook]
    processor: str | None
    has_active_adapter: bool
    outputs: list[Tensor] = field(default_factory=list)


def causes(policy: ModuleLook, reference: ModuleLook) -> list[str]:
    """Return what may cause a difference between two calls, the most likely first; at least one."""
    found = [
        *certain_causes(policy, reference),
        *_of_tensors("layout", "has strides", lambda look: look.strides, policy, reference),
        *_processor(policy, reference),
        *_of_tensors("alignment", "begins at a multiple of", lambda look: f"{look.alignment} bytes", policy, reference),
    ]
    return found or ["kernel: weights, dtypes, layout and alignment are the same, so torch chose other kernels"]


def certain_causes(policy: ModuleLook, reference: ModuleLook) -> list[str]:
    """Return what makes outputs differ on every device."""
    return [
        *_of_tensors("dtype", "is", lambda look: look.dtype, policy, reference),
        *_weights(policy, reference),
        *_adapter(policy, reference),
    ]


def _of_tensors(
    kind: str, words: str, quality: Callable[[TensorLook], object], policy: ModuleLook, reference: ModuleLook
) -> Iterator[str]:
    """Yield a cause with the first tensor that differs in a quality, and the number of further ones."""
    both = [(name, policy.tensors[name], look) for name, look in reference.tensors.items() if name in policy.tensors]
    differing = [(name, quality(own), quality(other)) for name, own, other in both if quality(own) != quality(other)]
    if differing:
        name, own, other = differing[0]
        more = f" (and {len(differing) - 1} more of its tensors)" if len(differing) > 1 else ""
        yield f"{kind}: its {name} {words} {own} in the policy, {other} in the reference{more}"


def _weights(policy: ModuleLook, reference: ModuleLook) -> Iterator[str]:
    for name, other in reference.tensors.items():
        own = policy.tensors.get(name)
        if own is None or other.content is None:
            continue
        if own.shape != other.shape:
            yield f"weights: its {name} has shape {own.shape} in the policy, {other.shape} in the reference"
        elif own.content != other.content:
            yield f"weights: its {name} has other values in the policy than in the reference"


def _adapter(policy: ModuleLook, reference: ModuleLook) -> Iterator[str]:
    if policy.has_active_adapter and not reference.has_active_adapter:
        yield "weights: its low-rank layers in the policy change its output"


def _processor(policy: ModuleLook, reference: ModuleLook) -> Iterator[str]:
    if policy.processor != reference.processor:
        yield f"kernel: {policy.processor} computes its attention in the policy, {reference.processor} in the reference"
