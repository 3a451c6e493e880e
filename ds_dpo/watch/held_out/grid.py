"""The fixed timesteps and noise of held-out pairs: K timesteps in each tenth of the range of training.

Legend: K draws per decile, I = 10 K items per pair (all draws of the first decile first); C,H,W latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_dpo.data.keyed_hash import keyed_hash

NUM_DECILES = 10


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Timesteps first_timestep to end_timestep (not included) in ten parts of about equal size."""

    first_timestep: int
    end_timestep: int
    draws_per_decile: int
    seed: int

    def __post_init__(self) -> None:
        assert self.end_timestep - self.first_timestep >= NUM_DECILES, "each decile must have a timestep"

    @property
    def num_items(self) -> int:
        """Number of items per pair."""
        return NUM_DECILES * self.draws_per_decile

    def decile_range(self, decile: int) -> range:
        """Return the timesteps of a decile."""
        span = self.end_timestep - self.first_timestep
        first, end = (self.first_timestep + span * edge // NUM_DECILES for edge in (decile, decile + 1))
        return range(first, end)

    def draw(self, pair_id: int, item: int, *, latent_shape: tuple[int, int, int]) -> tuple[int, Tensor]:
        """Return the timestep and the noise, (C, H, W) fp32 standard normal, of an item of a pair.

        They depend only on the arguments and the grid, as those of data.stream.draws do, and differ from training's.
        """

        def generator(name: str) -> np.random.Generator:
            return np.random.Generator(np.random.Philox(key=keyed_hash(name, self.seed, pair_id, item, bits=128)))

        timesteps = self.decile_range(item // self.draws_per_decile)
        timestep = timesteps[int(generator("held-out timestep").integers(len(timesteps)))]
        noise = generator("held-out noise").standard_normal(latent_shape, dtype=np.float32)
        return timestep, torch.from_numpy(noise)
