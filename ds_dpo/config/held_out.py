"""What a run is told to show of itself on pairs that it does not train on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, free_field


class HeldOutConfig(Section):
    """Pairs that training never sees, judged again and again at the same timesteps with the same noise."""

    every_steps: int | None = free_field(
        "optimizer steps between evaluations, also before the first step and at the end; none: never",
        default=None,
        ge=1,
    )
    dataset: str | None = free_field("hub id, folder or file of the pairs; none: data.dataset", default=None)
    name: str | None = free_field("its configuration (subset); none: data.name where dataset is none", default=None)
    split: str | None = free_field("its split, such as validation_unique; none: data.split", default=None)
    num_pairs: int = free_field(
        "take so many pairs, chosen by the seed; fewer where there are fewer", default=128, ge=2
    )
    draws_per_decile: int = free_field(
        "timesteps, each with noise of its own, at which a pair is judged in each tenth of the timesteps",
        default=1,
        ge=1,
    )
    seed: int = free_field("of the choice of pairs, their timesteps and noise", default=0, ge=0, lt=2**63)


class WatchdogConfig(Section):
    """What is done when the preferred images' error runs away from the reference's, the known collapse."""

    action: Literal["off", "warn", "lower_rate", "roll_back", "stop"] | None = free_field(
        "what is done; roll_back also lowers the rate; none: warn where held_out is on, else off", default=None
    )
    max_rise: float = free_field(
        "how far the policy's error of preferred images may stand above the reference's, as a share of it",
        default=0.25,
        gt=0,
    )
    patience: int = free_field("readings in a row above it before something is done", default=3, ge=1)
    window_steps: int | None = free_field(
        "steps of training metrics that make a reading where held_out is off; none: 50", default=None, ge=1
    )
    rate_factor: float | None = free_field(
        "what lower_rate and roll_back multiply the learning rate by, for good; none: 0.5", default=None, gt=0, lt=1
    )
    max_interventions: int = free_field("how often something is done; after that it only warns", default=2, ge=1)

    @model_validator(mode="after")
    def only_two_actions_lower_the_rate(self) -> WatchdogConfig:
        if self.rate_factor is not None and self.action not in ("lower_rate", "roll_back"):
            raise ValueError(
                f"watchdog.action {self.action or 'none'} ignores rate_factor {self.rate_factor}; take lower_rate or "
                "roll_back, or rate_factor none"
            )
        return self
