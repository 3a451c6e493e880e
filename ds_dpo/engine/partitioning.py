"""Divide weights among all ranks one by one, before an engine takes their module, so that no rank holds them all.

Source: zero.Init of deepspeed 0.19.8 (runtime/zero/partition_parameters.py), which divides the parameters of a module
that is in memory. This gives it one parameter at a time, and leaves out its broadcast: every rank reads the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.process.quiet import quiet_output

with quiet_output():  # when imported, DeepSpeed prints what it finds of compilers and drivers
    import deepspeed
    from deepspeed.utils import groups


class Partitioner:
    """Gives a module without memory its parameters, of which each rank keeps its part alone."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Every rank must call this. settings: the complete DeepSpeed settings, of stage 3, of the engine that follows.

        Torch's linear stays what it is until then: see use_lean_linear.
        """
        zero = {**settings["zero_optimization"], "memory_efficient_linear": False}
        with quiet_output():
            self._init: Any = deepspeed.zero.Init(
                # the group over which the engine gathers; DeepSpeed makes it if there is none yet
                data_parallel_group=groups._get_sequence_data_parallel_group(),
                config_dict_or_path={**settings, "zero_optimization": zero},
            )

    @torch.no_grad()
    def put(self, module: nn.Module, name: str, values: Tensor) -> None:
        """Replace a parameter by one of these values, and keep this rank's part of it. No rank waits for another.

        name: the parameter's, inside the module. Whether it is trained stays as it is. values: whole, on any device.
        """
        layer_name, _, own_name = name.rpartition(".")
        layer = module.get_submodule(layer_name)
        old = layer.get_parameter(own_name)
        parameter = nn.Parameter(values.to(self._init.local_device), requires_grad=old.requires_grad)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]  # which the line above gives it; it frees the values
        layer.register_parameter(own_name, parameter)


def use_lean_linear(settings: Mapping[str, Any]) -> None:
    """Let torch's linear in this process keep no gathered weight for the backward pass, if the settings have it so.

    DeepSpeed does this when it divides a module, but not when it gets a divided one.
    """
    with quiet_output():
        deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(settings))


def is_divided(module: nn.Module) -> bool:
    """Return whether any parameter of a module is divided among the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
