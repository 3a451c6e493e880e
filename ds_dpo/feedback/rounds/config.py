"""The fields of the one configuration file of scripts/rounds.py, each with its help. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.base import PathText, Section, free_field, identity_field

HUMAN = "human"
MOST_ROUNDS = 99


class DrawingSection(Section):
    """How images are drawn, for pairs and for the evaluation; one that is unset is the default of evaluate."""

    steps: int | None = identity_field("Sampling steps (30 if unset).", default=None, ge=1)
    guidance: float | None = identity_field("Guidance; 1 is off (5 if unset).", default=None, ge=1)
    scheduler: Literal["model", "ddim", "euler", "dpmpp"] | None = identity_field(
        "Sampler (the model's own if unset).", default=None
    )
    resolution: int | None = identity_field("Side of the images in pixels (the model's own if unset).", default=None)
    batch: int | None = identity_field(
        "Number of images drawn at once (as many as make 1024 x 1024 pixels if unset).", default=None, ge=1
    )
    dtype: Literal["fp32", "fp16", "bf16"] | None = identity_field(
        "Precision of drawing and of each round's exported model (fp16 if unset, fp32 on a CPU).", default=None
    )


class EvaluationSection(Section):
    """What judges the rounds. Its prompts are not trained on."""

    prompts: list[PathText] = identity_field(
        "Prompt sets of the evaluation, as evaluate takes them; keep them apart from the training prompts.",
        min_length=1,
    )
    images_per_prompt: int = identity_field("Images of each prompt and model.", default=4, ge=1)
    scorers: list[PathText] = identity_field("Further scorers, which are only reported.", default=[])
    held_out: PathText | None = identity_field(
        "Scorer that is not trained on; the rounds stop when it falls (they never stop early if unset).", default=None
    )
    least_fall: float | None = identity_field(
        "Stop when the held-out scorer's mean falls by more than this (by more than its 95 % interval if unset).",
        default=None,
        ge=0,
    )


class RunSection(Section):
    """The training run of each round."""

    config: PathText = identity_field("Preset or YAML file of the run, as train takes it.")
    options: dict[str, Any] = identity_field(
        "Options of the run on top of it, by dotted name, such as max_train_steps: 200.", default={}
    )


class LaunchSection(Section):
    """The processes that draw, train and evaluate."""

    ranks: int = free_field("Processes on this host.", default=1, ge=1)
    arguments: list[str] = free_field(
        "Further arguments of the deepspeed launcher, such as --hostfile and a file.", default=[]
    )


class RoundsConfig(Section):
    """Rounds of drawing, scoring, pairing, training and evaluation."""

    output_dir: PathText = free_field("Folder of all rounds.")
    rounds: int = free_field("Number of rounds; a larger number continues.", ge=1, le=MOST_ROUNDS)
    seed: int = identity_field("Seed of all draws; each round draws from other noise.", default=0, ge=0, le=1000)
    prompts: list[PathText] = identity_field("Prompt sets to draw from, as evaluate takes them.", min_length=1)
    images_per_prompt: int = identity_field("Images that each round draws of each prompt.", default=8, ge=2)
    scorers: list[PathText] = identity_field(
        "Scorers that label the pairs: as evaluate takes them, or human alone for people's votes in each round.",
        min_length=1,
    )
    votes: dict[int, list[PathText]] = free_field(
        "Files with people's votes, by the number of the round; in that round they replace the scorers.",
        default={},
    )
    pairs: Literal["best_worst", "all"] = identity_field(
        "Which images become pairs. best_worst: the best and the worst of each prompt. all: each two of a prompt.",
        default="best_worst",
    )
    least_margin: float = identity_field(
        "Leave out pairs whose scores differ by less, in standard deviations.", default=0.0, ge=0
    )
    reference: Literal["fixed", "following"] = identity_field(
        "What a round's policy is compared with. fixed: the first model. following: the model of the last round.",
        default="fixed",
    )
    drawing: DrawingSection = Field(default=DrawingSection(), description="How images are drawn.")
    evaluation: EvaluationSection = Field(description="What judges the rounds.")
    run: RunSection = Field(description="The training run of each round.")
    launch: LaunchSection = Field(default=LaunchSection(), description="The processes that do the work.")

    @field_validator("votes", mode="before")
    @classmethod
    def one_file_is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {number: [files] if isinstance(files, str) else files for number, files in value.items()}

    @model_validator(mode="after")
    def people_stand_in_alone(self) -> RoundsConfig:
        if HUMAN in self.scorers and len(self.scorers) > 1:
            raise ValueError(f"scorers {', '.join(self.scorers)}: people replace all scorers; give human alone")
        judges = [*self.evaluation.scorers, self.evaluation.held_out]
        if HUMAN in judges:
            raise ValueError("evaluation: human is no scorer there; votes on OUT/evaluation/page.html are for that")
        if self.scorers == [HUMAN] and not any(judges):
            raise ValueError(
                "scorers human: the evaluation has no scorer; give evaluation.held_out or evaluation.scorers"
            )
        odd = next((number for number in self.votes if not 1 <= number <= self.rounds), None)
        if odd is not None:
            raise ValueError(f"votes {odd}: there is no such round; a number from 1 to {self.rounds} would fit")
        return self

    def is_human(self, number: int) -> bool:
        """Return whether people's votes make the labels of a round."""
        return self.scorers == [HUMAN] or number in self.votes

    @property
    def training_scorers(self) -> list[str]:
        """The scorers that make labels, as words for --scorer."""
        return [resolve_asset(word) for word in self.scorers if word != HUMAN]

    @property
    def judging_scorers(self) -> list[str]:
        """All scorers of the evaluation, as words for --scorer: those of the labels, further ones, the held-out one."""
        asked = self.evaluation
        held_out = [] if asked.held_out is None else [asked.held_out]
        return list(dict.fromkeys([*self.training_scorers, *map(resolve_asset, [*asked.scorers, *held_out])]))
