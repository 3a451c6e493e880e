"""How many ranks of a node load their models at once: as many as its memory holds."""

from __future__ import annotations

import torch

from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.process.host_memory import available_bytes

SHARE_OF_MEMORY = 0.7  # the rest is for the mapped file, the loader's processes and all else
COPIES_ON_CPU = 3  # policy, reference and encoders stay in host memory, the encoders being smaller than a denoiser


def ranks_at_once(place: RankEnvironment, *, denoiser_bytes: int, device: torch.device, keeps_reference: bool) -> int:
    """Return how many ranks of a node may load at once besides the first one; the same on all ranks, which all call it.

    denoiser_bytes: size of one copy in the run's precision. keeps_reference: a GPU's rank keeps a second copy in host
    memory.
    """
    copies = COPIES_ON_CPU if device.type == "cpu" else 1
    kept = denoiser_bytes if keeps_reference and device.type != "cpu" else 0
    return min(gather_objects(fitting_ranks(place, available_bytes(), each=copies * denoiser_bytes, kept=kept)))


def fitting_ranks(place: RankEnvironment, available: int | None, *, each: int, kept: int) -> int:
    """Return the number of ranks that fit at once, at least 1.

    available: bytes free on the node, None if unknown. each: bytes that a rank takes while it loads. kept: bytes that
    each rank of the node keeps afterwards.
    """
    if available is None:
        return 1
    spare = SHARE_OF_MEMORY * available - place.local_world_size * kept
    return max(1, min(place.local_world_size - 1, int(spare // max(each, 1))))
