"""The checks before an export is complete: the written files, and how far the run moved from its base."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError, ModelError
from ds_dpo.export.tensors.safetensors_stream import DTYPE_NAMES, TensorSpec
from ds_dpo.export.tensors.weights import Weights

HALF_DTYPES = (torch.bfloat16, torch.float16)  # a run may have held the base in these
HEAD_ELEMENTS = 4096


def verify_files(paths: Sequence[Path], specs: Sequence[TensorSpec], *, others: Collection[str] = ()) -> None:
    """Read the written headers with the library that other programs use, and compare them with the specs.

    others: names of further tensors in the files. Raises CheckpointError if a tensor is missing, duplicate, unexpected,
    or of another shape or dtype, and if the number of elements is wrong.
    """
    from safetensors import safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in found:
                    raise CheckpointError(f"{path}: {name!r} was written twice")
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    expected = {spec.name: (DTYPE_NAMES[spec.dtype], spec.shape) for spec in specs}
    own = {name: entry for name, entry in found.items() if name not in others}
    for name in sorted({*expected, *own}):
        if expected.get(name) != own.get(name):
            raise CheckpointError(f"{paths[0]}: {name!r} was written as {own.get(name)}, not {expected.get(name)}")
    written, meant = (sum(math.prod(shape) for _, shape in entries.values()) for entries in (own, expected))
    if written != meant or any(math.prod(shape) == 0 for _, shape in own.values()):
        raise CheckpointError(f"{paths[0]}: {written} elements were written, not {meant}")
    absent = sorted(set(others) - found.keys())
    if absent:
        raise CheckpointError(f"{paths[0]}: {absent[0]!r} of the base file was lost")


@dataclass(frozen=True)
class Distance:
    """The distance of weights from the base's: squared Frobenius norms, and the tensors that moved beyond rounding."""

    squared: Mapping[str, float]
    base_squared: Mapping[str, float]
    moved: frozenset[str]
    base_dtype: torch.dtype

    @property
    def relative(self) -> float:
        """The norm of the whole difference divided by the norm of the whole base."""
        return math.sqrt(sum(self.squared.values()) / max(sum(self.base_squared.values()), 1e-300))

    def describe(self) -> str:
        """Return a line for the user; it is a warning if nothing was trained."""
        if not self.moved:
            return (
                f"WARNING: this run trained nothing: none of {len(self.squared)} tensors differs from the base's "
                f"by more than the rounding of {self.base_dtype} (relative distance {self.relative:.3g})"
            )
        most = max(self.moved, key=lambda name: self.squared[name] / max(self.base_squared[name], 1e-300))
        share = math.sqrt(self.squared[most] / max(self.base_squared[most], 1e-300))
        return (
            f"distance from the base: {self.relative:.4g} of its norm; {len(self.moved)} of {len(self.squared)} "
            f"tensors moved, most {most} by {share:.4g}"
        )


def measure_distance(weights: Weights, base: Mapping[str, Tensor]) -> Distance:
    """Compare every fp32 master with the base's own value, one tensor at a time.

    A tensor has not moved if it rounds to the base's values in the base's dtype, or if it equals the base's rounding to
    16 bit, from which a run may have started.
    Raises ModelError that names the first difference if the base has other tensors or shapes.
    """
    shapes = {name: placement.shape for name, placement in weights.parameters.items()}
    for name in sorted({*shapes, *base}):
        if name not in shapes or name not in base or tuple(base[name].shape) != shapes[name]:
            there = tuple(base[name].shape) if name in base else "absent"
            raise ModelError(
                f"the base's UNet is not that of this run: {name!r} is {there} in the base and "
                f"{shapes.get(name, 'absent')} in the checkpoint; give the right base with --base"
            )
    squared, base_squared, moved = {}, {}, set()
    for name in shapes:
        own, master = base[name], weights.read(name)
        if not is_rounding_of(own, master):
            moved.add(name)
        difference = own.to(torch.float32, copy=True)
        base_squared[name] = _squared_norm(difference)
        squared[name] = _squared_norm(difference.sub_(master))
    return Distance(squared, base_squared, frozenset(moved), next(iter(base.values())).dtype)


def is_rounding_of(own: Tensor, master: Tensor) -> bool:
    """Return whether an fp32 tensor equals own in own's dtype, or equals own's rounding to 16 bit."""
    # a tensor that moved usually did so in its first elements, so that the rest need not be compared
    head = own.reshape(-1)[:HEAD_ELEMENTS], master.reshape(-1)[:HEAD_ELEMENTS]
    return _is_rounding(*head) and _is_rounding(own, master)


def _is_rounding(own: Tensor, master: Tensor) -> bool:
    if torch.equal(master.to(own.dtype), own):
        return True
    return any(torch.equal(own.to(dtype).to(torch.float32), master) for dtype in HALF_DTYPES)


def _squared_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
