"""The ranks of an evaluation: started by deepspeed, torchrun or srun, or one alone; joined without DeepSpeed."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed

from ds_dpo.distributed.arithmetic import set_arithmetic
from ds_dpo.distributed.collectives import is_initialized
from ds_dpo.distributed.device import pick_device
from ds_dpo.distributed.environment import RankEnvironment, export_environment, read_environment
from ds_dpo.evaluation.drawing.generate import usable_device

# ranks wait for the slowest one; if one dies, its launcher ends the others
LONGEST_WAIT = timedelta(days=7)


def join_ranks(device: str) -> tuple[RankEnvironment, torch.device]:
    """Join the other ranks of this launch; returns this rank's place and device.

    device: auto is this rank's GPU, or the CPU if there is none. Ranks share small objects alone, by gloo. Raises
    ConfigError for an environment that contradicts itself, or a device that cannot be used.
    """
    place = read_environment(os.environ)
    if device in ("auto", "cuda"):
        chosen = pick_device(place.local_rank, os.environ, needs_gpu=device == "cuda").device
    else:
        chosen = usable_device(device)
    # every start draws the same image to the bit, as far as the kernels allow
    set_arithmetic(allow_tf32=False, deterministic=False, environ=os.environ)
    if place.world_size > 1 and not is_initialized():
        export_environment(place)
        distributed.init_process_group("gloo", init_method="env://", timeout=LONGEST_WAIT)
    return place, chosen
