"""Do one micro-batch forward and backward on a plain module, and find what is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.batch import PreferenceBatch
from ds_dpo.step.preference_step import PreferenceStep


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of a micro-batch of B pairs.

    quantities: B numbers by metric name. bad_parameters: those whose gradient is not finite, in the module's order.
    bad_module: the first module with finite input and an output that is not finite. operation: autograd's first
    operation whose gradient is NaN. Both are None if there is none, or without detect_anomaly.
    """

    quantities: dict[str, list[float]]
    bad_parameters: Sequence[str]
    bad_module: str | None
    operation: str | None

    @property
    def is_finite(self) -> bool:
        return not self.bad_parameters and bool(torch.isfinite(torch.tensor(self.quantities["loss"])).all())


class GradientSums:
    """Sums gradients over micro-batches in fp32, parameter by parameter, for the norm of the whole step's gradient."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_micro_batches = 0

    def add(self, policy: nn.Module) -> None:
        """Add the policy's gradients."""
        self._num_micro_batches += 1
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient.clone()

    def norm(self, *, factor: float) -> float:
        """Return the 2-norm of the mean gradient over micro-batches, whose losses were multiplied by factor."""
        squares = [gradient.double().square().sum() for gradient in self._sums.values()]
        return float(torch.stack(squares).sum().sqrt()) / (factor * self._num_micro_batches)


def examine(
    policy: nn.Module,
    step: PreferenceStep,
    batch: PreferenceBatch,
    *,
    factor: float,
    sums: GradientSums,
    detect_anomaly: bool,
) -> Examination:
    """Do a micro-batch as a run does, and examine all of it.

    factor: multiplies the loss before the backward pass, as fp16 and accumulation do. sums: gets the gradients.
    detect_anomaly: also name the module and the operation, which takes several times as long.
    """
    policy.zero_grad(set_to_none=True)
    found: list[str] = []
    operation: str | None = None
    looking = _first_bad_outputs(policy, found) if detect_anomaly else nullcontext()
    with looking, torch.autograd.set_detect_anomaly(detect_anomaly):
        output = step(batch)
        try:
            (output.loss * factor).backward()
        except RuntimeError as error:
            if not detect_anomaly or "returned nan values" not in str(error):
                raise
            operation = str(error)
    if operation is not None:  # the anomaly ended the pass: repeat it for all gradients
        policy.zero_grad(set_to_none=True)
        (step(batch).loss * factor).backward()
    sums.add(policy)
    bad = [name for name, parameter in policy.named_parameters() if not _is_finite(parameter.grad)]
    return Examination(
        quantities={name: values.float().tolist() for name, values in output.pair_quantities.items()},
        bad_parameters=bad,
        bad_module=found[0] if found else None,
        operation=operation,
    )


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


@contextmanager
def _first_bad_outputs(policy: nn.Module, found: list[str]) -> Iterator[None]:
    """Add to `found` the names of modules that make something not finite of what is, in the order of their ends."""

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if _tensors_finite(inputs) and not _tensors_finite(output):
                found.append(f"{name or 'the policy'} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in policy.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or _is_finite(value)
    if isinstance(value, dict):
        return all(map(_tensors_finite, value.values()))
    return all(map(_tensors_finite, value)) if isinstance(value, tuple | list) else True
