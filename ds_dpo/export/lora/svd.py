"""Compute a LoRA from a fully tuned model: the best approximation of each layer's change with a given rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.export.lora.file import LoraLayer
from ds_dpo.export.request import ALL_TARGETS, LORA_TARGETS
from ds_dpo.export.tensors.verification import Distance
from ds_dpo.export.tensors.weights import Weights


def decompose(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (up, down) of a matrix, [rows, rank] and [rank, columns], by its singular value decomposition.

    Only the rank largest singular values are kept, and both factors get the root of them. The eigenvectors of the
    smaller Gram matrix need half the time of a full decomposition and, unlike torch.svd_lowrank, give the best
    approximation of a matrix whose singular values hardly decay, as those of a tuned layer's change do.
    """
    is_tall = change.shape[0] > change.shape[1]
    wide = change.mT if is_tall else change
    _, vectors = torch.linalg.eigh(wide @ wide.mT)
    basis = vectors[:, -rank:].flip(1)  # eigh returns the largest last
    projected = basis.mT @ wide
    values = torch.linalg.vector_norm(projected, dim=1)
    root = values.sqrt()
    left, right = basis * root, projected * torch.where(values > 0, 1 / root, 0)[:, None]
    return (right.mT.contiguous(), left.mT.contiguous()) if is_tall else (left, right)


def can_hold(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a LoRA can hold the change of a parameter: only of linear and convolution layers' weights."""
    return name.endswith(".weight") and len(shape) in (2, 4)


def lora_layers(
    shapes: Mapping[str, tuple[int, ...]], *, rank: int, targets: str = ALL_TARGETS
) -> dict[str, LoraLayer]:
    """Return the layers that a LoRA of at most that rank has for parameters of these shapes, by module, with scale 1.

    targets: a key of LORA_TARGETS.
    """
    found = {}
    for name, shape in sorted(shapes.items()):
        module = name.removesuffix(".weight")
        if can_hold(name, shape) and any(part in module for part in LORA_TARGETS[targets]):
            own = min(rank, shape[0], math.prod(shape[1:]))
            up = (shape[0], own, 1, 1) if len(shape) == 4 else (shape[0], own)
            found[module] = LoraLayer((own, *shape[1:]), up, 1.0)
    return found


@dataclass
class ChangeLora:
    """The LoRA of a given rank of the change by training. Its factors are computed layer by layer while it is written.

    left_over: for each layer written so far, the squared Frobenius norm of the change that the file does not hold.
    """

    weights: Weights
    base: Mapping[str, Tensor]
    distance: Distance
    rank: int
    dtype: torch.dtype
    targets: str = ALL_TARGETS
    left_over: dict[str, float] = field(default_factory=dict)
    _latest: tuple[str, dict[str, Tensor]] | None = None

    def layers(self) -> dict[str, LoraLayer]:
        """Return the target layers that changed, by module, with at most the given rank, and scale 1.

        Raises CheckpointError if no layer changed.
        """
        shapes = {name: place.shape for name, place in self.weights.parameters.items()}
        changed = {name: shape for name, shape in shapes.items() if self.distance.squared[name] > 0}
        found = lora_layers(changed, rank=self.rank, targets=self.targets)
        if not found:
            among = "" if self.targets == ALL_TARGETS else f" among --lora_targets {self.targets}"
            raise CheckpointError(
                f"{self.weights.folder}: no layer{among} differs from the base, so a LoRA would be empty"
            )
        return found

    def produce(self, module: str, part: str) -> Tensor:
        """Return a factor of a module's change; the first call computes both."""
        if self._latest is None or self._latest[0] != module:
            self._latest = (module, self._factors(module))
        return self._latest[1][part]

    def _factors(self, module: str) -> dict[str, Tensor]:
        name = f"{module}.weight"
        own = self.base[name]
        change = self.weights.read(name).sub_(own.to(torch.float32)).flatten(1)
        if not change.isfinite().all():
            raise CheckpointError(f"{self.weights.folder}: {name!r} has values that are NaN or infinite")
        rank = min(self.rank, *change.shape)
        up, down = decompose(change, rank)
        # readers multiply the rounded factors
        self.left_over[module] = float(
            torch.linalg.vector_norm(change.sub_(up.to(self.dtype).float() @ down.to(self.dtype).float())) ** 2
        )
        shape = own.shape
        tail = (1, 1) if len(shape) == 4 else ()
        return {"up": up.reshape(shape[0], rank, *tail), "down": down.reshape(rank, *shape[1:])}

    def share_of(self, modules: Sequence[str]) -> float:
        """Return the share of these modules in the squared change of all layers written so far."""
        squared = {module: self.distance.squared[f"{module}.weight"] for module in self.left_over}
        return sum(squared[module] for module in modules) / sum(squared.values())

    def describe(self) -> list[str]:
        """Return lines on how much of the change the written file holds."""
        squared = self.distance.squared
        total = sum(squared.values())
        in_layers = sum(squared[f"{module}.weight"] for module in self.left_over)
        kept = in_layers - sum(self.left_over.values())
        share = {module: 1 - left / squared[f"{module}.weight"] for module, left in self.left_over.items()}
        worst = ", ".join(f"{module} {share[module]:.1%}" for module in sorted(share, key=share.__getitem__)[:3])
        return [
            f"energy kept at rank {self.rank}: {kept / total:.2%} of the squared difference from the base, "
            f"{kept / in_layers:.2%} of that in {len(share)} layers, with the file's rounded numbers; lowest: {worst}",
            *self._describe_lost(total),
        ]

    def _describe_lost(self, total: float) -> list[str]:
        squared = self.distance.squared
        outside = [name for name in squared if not can_hold(name, tuple(self.base[name].shape))]
        lost = sum(squared[name] for name in outside)
        largest = ", ".join(sorted(outside, key=squared.__getitem__, reverse=True)[:3])
        lines = [
            f"not in a LoRA: {len(outside)} biases and norms hold {lost / total:.2%} of the squared difference, "
            f"which is lost; most in {largest or 'none'}"
        ]
        if self.targets != ALL_TARGETS:
            held = {*outside, *(f"{module}.weight" for module in self.left_over)}
            others = [name for name in squared if name not in held and squared[name] > 0]
            lines.append(
                f"left out by --lora_targets {self.targets}: {len(others)} layers hold "
                f"{sum(squared[name] for name in others) / total:.2%} of the squared difference, which is lost"
            )
        return lines
