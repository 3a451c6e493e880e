"""The optimizers of a run, by name: torch's AdamW, and those of bitsandbytes if it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ds_dpo.config.optimization import OptimizerConfig
from ds_dpo.errors import ConfigError

Build = Callable[[Sequence[nn.Parameter], OptimizerConfig, bool], torch.optim.Optimizer]


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: OptimizerConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """Return the optimizer of config over the trained parameters.

    fused: use one kernel for all parameters, if the optimizer is torch's. Raises ConfigError if its package is
    missing. Sources: arXiv:1711.05101 (AdamW), arXiv:2302.06675 (Lion), arXiv:2110.02861 (8 bit, in blocks of 256).
    """
    return OPTIMIZERS[config.type](parameters, config, fused)


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    # needs no compiler, unlike DeepSpeed's own optimizers
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        eps=config.epsilon,
        fused=fused,
    )


def _adamw_8bit(parameters: Sequence[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return _bitsandbytes(config).AdamW8bit(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        eps=config.epsilon,
    )


def _lion(name: str) -> Build:
    def build(parameters: Sequence[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
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
