"""A denoiser that is never whole: a module without memory, and its tensors one after another, from any kind of file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ds_dpo.config.models import ModelConfig
from ds_dpo.models.denoiser.adapters import is_of_adapter, name_without_adapter
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.loading import denoiser_part, file_weights, names_the_model, with_tables
from ds_dpo.models.weights.alignment import align_weights
from ds_dpo.models.weights.parts import require_names, skeleton, stream


@dataclass(frozen=True, kw_only=True)
class DenoiserStream:
    """A denoiser before its weights are read. source: their origin, for errors."""

    model_class: Any
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    source: str

    def empty(self, *, device: torch.device) -> ModelMixin:
        """Return the module in training mode: its parameters have shapes, and no memory; its tables have their values.

        Every call returns a module of its own. Raises ModelError if the weights have other names than the module.
        """
        module = skeleton(self.model_class, self.config)
        nn.Module.to(module, self.dtype)  # diffusers' own warns of nothing here
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        require_names(self.weights, shapes, source=self.source)
        parameters = dict(module.named_parameters())
        tables = {name: shape for name, shape in shapes.items() if name not in parameters}
        for name, table in stream(self.weights, tables, dtype=self.dtype, source=self.source):
            module.get_buffer(name).copy_(table)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        align_weights(module)
        read_row_major(module)
        assert isinstance(module, ModelMixin)
        return module.train()

    def parameters(self, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the weights of a module of `empty`, on the host, in dtype, in the order of its parameters.

        Each has its name in the module, its name without an adapter, and its values. module: may have got an adapter,
        whose own parameters are left out. Only the tensor that is yielded is in memory. Raises ModelError that names a
        tensor of another shape, or with a value that is not finite.
        """
        own = {name_without_adapter(name): name for name, _ in module.named_parameters() if not is_of_adapter(name)}
        shapes = {name: module.get_parameter(own[name]).shape for name in own}
        for name, tensor in stream(self.weights, shapes, dtype=self.dtype, source=self.source):
            yield own[name], name, tensor
            del tensor


@names_the_model
def open_denoiser_stream(
    model: ModelConfig, *, dtype: torch.dtype, start: Mapping[str, Tensor] | None = None
) -> DenoiserStream:
    """Return the denoiser of load_denoiser before its weights are read, with the same arguments and errors."""
    part = denoiser_part(model)
    model_class = FAMILIES[model.family].denoiser.model_class()
    weights: Mapping[str, Tensor] = start or file_weights(model)
    source = f"model.denoiser_init {model.denoiser_init}" if model.denoiser_init else model.pretrained
    return DenoiserStream(
        model_class=model_class,
        config=part.config,
        weights=with_tables(skeleton(model_class, part.config), weights, part),
        dtype=dtype,
        source=source,
    )
