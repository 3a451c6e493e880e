"""DeepSpeed's communication between ranks on their devices; needs no engine."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch

from ds_dpo.process.quiet import quiet_output

with quiet_output():  # DeepSpeed probes compilers and drivers aloud when imported
    import deepspeed
    from deepspeed.utils import logger


def start_communication(*, timeout: timedelta, device: torch.device) -> None:
    """Join all ranks in one process group: NCCL on GPUs, gloo on CPUs. The environment has the ranks' numbers."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed takes the GPU of this number, which differs from the rank's where a scheduler shows each its own
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        # DeepSpeed's shared-memory collectives for CPUs need a C++ compiler and minutes to compile; gloo needs neither
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet_output():
        deepspeed.init_distributed(timeout=timeout, verbose=False)


def silence_deepspeed() -> None:
    """Make DeepSpeed log errors only; the run's own log has what a user needs."""
    logger.setLevel(logging.ERROR)
