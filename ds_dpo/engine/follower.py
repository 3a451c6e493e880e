"""A frozen module that follows the policy: its weights are a moving average of the fp32 masters, rounded.

Each rank keeps its own part of the average, as of the masters, so that changes add up that are too small for 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ds_dpo.distributed.collectives import gather_objects, rank, sum_across_ranks
from ds_dpo.engine.layout import EngineLayout
from ds_dpo.engine.moving_average import MovingAverage
from ds_dpo.process.quiet import quiet_output

with quiet_output():  # when imported, DeepSpeed prints what it finds of compilers and drivers
    import deepspeed

_PIECE_ELEMENTS = 2**25  # 64 MiB in 16 bits


class Follower:
    """Writes an average into a module, which is whole on each rank or divided among all.

    Every rank must call each method. A weight that the policy does not train stays as it is.
    """

    def __init__(
        self, module: nn.Module, *, average: MovingAverage, layout: EngineLayout, device: torch.device
    ) -> None:
        """Start from the module's own weights. module: frozen, plain or in an engine of ZeRO 3.

        average: of this rank's masters, wherever they are; it is set here. layout: that of the masters. device: on
        which ranks exchange tensors.
        """
        self._module = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
        self._trained = layout.placements.keys()
        self._parts = {part.name: part for part in layout.parts}
        self._average, self._device = average, device
        self._take_start()

    @torch.no_grad()
    def _take_start(self) -> None:
        for piece in weight_pieces(self._module):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in piece]):  # a no-op for plain ones
                for name, parameter in piece:
                    part = self._parts.get(name)
                    if part is not None:
                        values = parameter.detach().flatten()[part.start : part.start + part.numel]
                        part.of(self._average.groups).copy_(values)

    @torch.no_grad()
    def write(self) -> None:
        """Set the module's weights to the present average, rounded to their dtype."""
        for parameter, whole in self._averaged():
            for held, values in _held_with(parameter, whole):
                held.copy_(values)

    @torch.no_grad()
    def ranks_that_differ(self) -> list[int]:
        """Return the ranks on which the module's weights are not what `write` set: something else has changed them."""
        same = True
        for parameter, whole in self._averaged():
            same = same and all(
                torch.equal(held, values.to(held.device)) for held, values in _held_with(parameter, whole)
            )
        return [place for place, is_same in enumerate(gather_objects(same)) if not is_same]

    def _averaged(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the module's trained parameters, each with its whole average in its shape and dtype."""
        for piece in weight_pieces(self._module):
            trained = [(name, parameter) for name, parameter in piece if name in self._trained]
            if not trained:
                continue
            sizes = [_numel(parameter) for _, parameter in trained]
            # each element is in one rank's part, so that the sum is exact
            flat = torch.zeros(sum(sizes), dtype=trained[0][1].dtype, device=self._device)
            wholes = flat.split(sizes)
            for (name, _), whole in zip(trained, wholes, strict=True):
                part = self._parts.get(name)
                if part is not None:
                    whole[part.start : part.start + part.numel].copy_(part.of(self._average.groups))
            sum_across_ranks(flat)
            for (_, parameter), whole in zip(trained, wholes, strict=True):
                yield parameter, whole.view(_shape(parameter))


def _held_with(parameter: nn.Parameter, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor in which this rank holds values of a parameter, and those values of the whole one."""
    divided = getattr(parameter, "ds_tensor", None)
    if divided is None:
        yield parameter.data, whole
        return
    own, values = divided.data.view(-1), whole.flatten()
    start = rank() * own.numel()
    own = own[: max(0, values.numel() - start)]  # the rest is padding
    yield own, values[start : start + own.numel()]
    if parameter.data.numel() == whole.numel():  # a small one, which stays whole
        yield parameter.data, whole


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def weight_pieces(module: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Yield a module's parameters by name in pieces of about _PIECE_ELEMENTS elements."""
    piece: list[tuple[str, nn.Parameter]] = []
    num_elements = 0
    for name, parameter in module.named_parameters():
        piece.append((name, parameter))
        num_elements += _numel(parameter)
        if num_elements >= _PIECE_ELEMENTS:
            yield piece
            piece, num_elements = [], 0
    if piece:
        yield piece
