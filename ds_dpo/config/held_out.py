"""The sections on held-out pairs and on the watchdog that reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import PathText, Section, free_field, identity_field
from ds_dpo.config.data import FormatName


class HeldOutConfig(Section):
    """Pairs that are not trained on; each evaluation uses the same timesteps and the same noise."""

    every_steps: int | None = free_field(
        "Evaluate the held-out pairs before the first step, every N optimizer steps, and at the end (off if unset).",
        default=None,
        ge=1,
    )
    dataset: PathText | None = free_field(
        "Hub id, folder or file of the held-out pairs (data.dataset if unset).", default=None
    )
    name: str | None = free_field(
        "Configuration (subset) of the held-out dataset. If unset: data.name where held_out.dataset is unset too, "
        "else the dataset's only one.",
        default=None,
    )
    split: str | None = free_field(
        "Split of the held-out pairs, such as validation_unique (data.split if unset).", default=None
    )
    share: float | None = identity_field(
        "Hold out this share of the prompts of data.dataset with all their pairs, such as 0.05: they are never trained "
        "on. A formula of the prompt's text chooses them (off if unset).",
        default=None,
        gt=0,
        lt=1,
    )
    format: FormatName | None = free_field(
        "How a row of the held-out pairs states them (data.format if unset).", default=None
    )
    columns: list[str] = free_field(
        "ROLE=COLUMN for columns of the held-out pairs (no entries: those of data.columns, where the format is the "
        "same).",
        default=[],
    )
    num_pairs: int = free_field(
        "Number of held-out pairs, chosen by held_out.seed; all of them if the dataset has fewer.", default=128, ge=2
    )
    draws_per_decile: int = free_field(
        "Evaluate each held-out pair at N timesteps, each with its own noise, in each tenth of the timesteps that "
        "training draws from.",
        default=1,
        ge=1,
    )
    seed: int = free_field(
        "Seed that chooses the held-out pairs, their timesteps and their noise.", default=0, ge=0, lt=2**63
    )

    @model_validator(mode="after")
    def a_share_is_of_the_pairs_of_data(self) -> HeldOutConfig:
        given = [name for name in ("dataset", "name", "split", "format", "columns") if getattr(self, name)]
        if self.share is not None and given:
            raise ValueError(
                f"held_out.share {self.share:g} holds out pairs of data.dataset and data.split, so held_out.{given[0]} "
                f"{getattr(self, given[0])} has no effect; give one of the two"
            )
        return self


class WatchdogConfig(Section):
    """What happens when the policy's error on preferred images rises far above the reference's: the known collapse."""

    action: Literal["off", "warn", "lower_rate", "roll_back", "stop"] | None = free_field(
        "What to do when preferred images get much worse than under the reference. lower_rate: multiply the learning "
        "rate by rate_factor. roll_back: return to an earlier checkpoint and lower the rate. stop: save and end. If "
        "unset: warn where held_out is on, else off.",
        default=None,
    )
    max_rise: float = free_field(
        "Limit of (policy error / reference error) - 1 on preferred images; 0.25 allows 25 % above the reference.",
        default=0.25,
        gt=0,
    )
    max_fall: float | None = free_field(
        "Also act when the metric of cadence.keep_best is worse than its best value by more than this, in units of the "
        "metric; roll_back then returns to the best checkpoint (off if unset).",
        default=None,
        gt=0,
    )
    patience: int = free_field(
        "The watchdog acts after N readings in a row beyond watchdog.max_rise, or N beyond watchdog.max_fall.",
        default=3,
        ge=1,
    )
    window_steps: int | None = free_field(
        "Average N training steps into one watchdog reading where held_out is off (50 if unset).", default=None, ge=1
    )
    rate_factor: float | None = free_field(
        "Factor by which lower_rate and roll_back multiply the learning rate for the rest of the run (0.5 if unset).",
        default=None,
        gt=0,
        lt=1,
    )
    max_interventions: int = free_field("The watchdog acts at most N times and then only warns.", default=2, ge=1)

    @model_validator(mode="after")
    def only_two_actions_lower_the_rate(self) -> WatchdogConfig:
        if self.rate_factor is not None and self.action not in ("lower_rate", "roll_back"):
            raise ValueError(
                f"watchdog.action {self.action or 'none'} ignores watchdog.rate_factor {self.rate_factor}; set action "
                "to lower_rate or roll_back, or rate_factor to none"
            )
        return self
