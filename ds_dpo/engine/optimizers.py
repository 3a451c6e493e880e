"""The optimizers of a run, by name: torch's fused AdamW, and those of bitsandbytes if it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_dpo.config.optimization import OptimizerConfig
from ds_dpo.errors import ConfigError

Build = Callable[[Sequence[nn.Parameter], OptimizerConfig], torch.optim.Optimizer]

LARGEST_INT32 = 2**31 - 1
_SUB_GROUP_ELEMENTS = 1_000_000_000  # DeepSpeed's default of sub_group_size


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of config over the trained parameters.

    Raises ConfigError if its package is missing. Sources: arXiv:1711.05101 (AdamW), arXiv:2302.06675 (Lion),
    arXiv:2110.02861 (8 bit, in blocks of 256).
    """
    return OPTIMIZERS[config.type](parameters, config)


def require_countable(config: OptimizerConfig, *, num_trained: int, zero: Mapping[str, Any], world_size: int) -> None:
    """Raise ConfigError if bitsandbytes would update more elements at once than it counts: it has 32 bits for that.

    num_trained: trained elements of the whole model. zero: the block zero_optimization. Below stage 3 a rank's part is
    one flat tensor, and at stage 3 it is cut into sub-groups. Source: bitsandbytes/backends/cuda/ops.py,
    ct.c_int32(g.numel()), which wraps.
    """
    if config.type == "adamw":
        return
    at_once = math.ceil(num_trained / world_size)
    if zero.get("stage") == 3:
        at_once = min(at_once, int(zero.get("sub_group_size", _SUB_GROUP_ELEMENTS)))
    if at_once <= LARGEST_INT32:
        return
    raise ConfigError(
        f"optimizer.type {config.type} would update {at_once} elements of a rank at once, and bitsandbytes counts no "
        f"more than {LARGEST_INT32}: take adamw, deepspeed_config zero3_bf16, or at least "
        f"{math.ceil(num_trained / LARGEST_INT32)} ranks"
    )


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    # needs no compiler, unlike DeepSpeed's own optimizers
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        eps=config.epsilon,
        fused=True,  # on the CPU too, where torch would otherwise loop over tensors: nine times slower when offloaded
    )


def _adamw_8bit(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return _bitsandbytes(config).AdamW8bit(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        eps=config.epsilon,
    )


def _lion(name: str) -> Build:
    def build(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
        return getattr(_bitsandbytes(config), name)(
            parameters,
            lr=config.learning_rate,
            betas=(config.lion_beta1, config.lion_beta2),
            weight_decay=config.weight_decay,
        )

    return build


def _bitsandbytes(config: OptimizerConfig) -> Any:
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:  # its libraries may not fit this machine
        raise ConfigError(
            f"optimizer.type {config.type} needs bitsandbytes: pip install bitsandbytes ({error})"
        ) from error
    return bitsandbytes.optim


OPTIMIZERS: dict[str, Build] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "lion": _lion("Lion"),
    "lion_8bit": _lion("Lion8bit"),
}
