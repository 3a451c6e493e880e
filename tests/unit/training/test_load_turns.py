"""As many ranks load at once as a node's memory holds, and all ranks agree on the number."""

from __future__ import annotations

import pytest
import torch

from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.training import load_turns
from ds_dpo.training.load_turns import fitting_ranks, ranks_at_once

GB = 10**9
SDXL = 5_134_927_368  # bytes in bf16
NODE = RankEnvironment(
    rank=0, world_size=16, local_rank=0, local_world_size=8, master_addr="localhost", master_port=29500
)


@pytest.mark.parametrize(
    ("available", "each", "kept", "fits"),
    [
        (None, SDXL, 0, 1),  # unknown
        (10 * GB, SDXL, 0, 1),  # one always loads
        (20 * GB, SDXL, 0, 2),  # 14 / 5.13
        (64 * GB, SDXL, 0, 7),  # 44.8 / 5.13 = 8.7, but the first rank loads alone before the other seven
        (64 * GB, SDXL, SDXL, 1),  # a reference on the host of each of the 8 ranks takes 41.1 of the 44.8
        (96 * GB, SDXL, SDXL, 5),  # (67.2 - 41.1) / 5.13 = 5.08
    ],
)
def test_what_fits_is_counted(available: int | None, each: int, kept: int, fits: int) -> None:
    assert fitting_ranks(NODE, available, each=each, kept=kept) == fits


def test_the_node_with_the_least_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_turns, "available_bytes", lambda: 64 * GB)
    monkeypatch.setattr(load_turns, "gather_objects", lambda own: [own, 2])
    found = ranks_at_once(NODE, denoiser_bytes=SDXL, device=torch.device("cuda", 0), keeps_reference=False)
    assert found == 2
    monkeypatch.setattr(load_turns, "gather_objects", lambda own: [own])
    assert ranks_at_once(NODE, denoiser_bytes=SDXL, device=torch.device("cuda", 0), keeps_reference=False) == 7
    # policy, reference and encoders of a CPU's rank stay on the host: 44.8 / 15.4
    assert ranks_at_once(NODE, denoiser_bytes=SDXL, device=torch.device("cpu"), keeps_reference=False) == 2
