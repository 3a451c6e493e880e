"""The device of this rank, and DeepSpeed's communication between ranks on it; needs no engine."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch

from ds_dpo.process.quiet import quiet_output

with quiet_output():  # DeepSpeed probes compilers and drivers aloud when imported
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger


def start_communication(*, timeout: timedelta, device: torch.device) -> None:
    """Join all ranks in one process group: NCCL on GPUs, gloo on CPUs. The environment has the ranks' numbers."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # DeepSpeed's shared-memory collectives for CPUs need a C++ compiler and minutes to compile; gloo needs neither
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet_output():
        deepspeed.init_distributed(timeout=timeout, verbose=False)


def pick_device(local_rank: int) -> torch.device:
    """Return this rank's device: its GPU if DeepSpeed's accelerator is CUDA, else the CPU."""
    name = get_accelerator().device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(name, local_rank)


def silence_deepspeed() -> None:
    """Make DeepSpeed log errors only; the run's own log has what a user needs."""
    logger.setLevel(logging.ERROR)
