"""DeepSpeed's communication between ranks on their devices; needs no engine."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from ds_dpo.process.quiet import quiet_output

with quiet_output():  # DeepSpeed probes compilers and drivers aloud when imported
    import deepspeed
    from deepspeed.utils import groups, logger

_TIMEOUT: list[timedelta] = []  # of this process; the last one counts


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
    groups._clone_world_group()  # which DeepSpeed would make with its first engine
    _TIMEOUT.append(timeout)
    give_groups_the_timeout()


def give_groups_the_timeout() -> None:
    """Give all process groups of this rank the timeout of start_communication, if it was called.

    DeepSpeed communicates in groups of its own, which it makes without a timeout: NCCL would end a rank after 10
    minutes, before the hang watch and without stacks. Call it after each engine is made.
    """
    for timeout in _TIMEOUT[-1:]:
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)


def silence_deepspeed() -> None:
    """Make DeepSpeed log errors only; the run's own log has what a user needs."""
    logger.setLevel(logging.ERROR)
