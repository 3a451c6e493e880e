"""The commands of a round's stages: each is a program of the package, with its arguments. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.evaluation.scorers.choice import read_choices
from ds_dpo.feedback.rounds.config import RoundsConfig
from ds_dpo.feedback.rounds.folder import BASE, RoundsFolder, label_of
from ds_dpo.feedback.rounds.run_options import run_arguments

SEEDS_OF_A_SERIES = 10**9  # all rounds of one `seed`; those of evaluations are below the first series
ALONE = ("consolidate",)  # on one process


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Makes the commands of all rounds. model: section of the runs. num_prompts: to draw from."""

    config: RoundsConfig
    folder: RoundsFolder
    model: ModelConfig
    num_prompts: int

    def first_seed(self, number: int) -> int:
        """Return the seed of a round's first image; no two rounds share a seed."""
        of_a_round = self.num_prompts * self.config.images_per_prompt
        return (1 + self.config.seed) * SEEDS_OF_A_SERIES + (number - 1) * of_a_round

    def draw(self, number: int) -> list[str]:
        """Draw and score; and form pairs unless people vote."""
        config, place = self.config, self.folder.round(number)
        own = [
            *("--model", self._model(number - 1), "--labels", label_of(number - 1)),
            *("--prompts", *map(resolve_asset, config.prompts), "--seeds", str(config.images_per_prompt)),
            *("--first_seed", str(self.first_seed(number)), "--out", str(place.pairs), *self._drawing()),
        ]
        if config.is_human(number):
            return ["evaluate", *own, "--scorer", *config.judging_scorers]
        rule = ("--pairs", config.pairs, "--least_margin", str(config.least_margin))
        return ["make-pairs", *own, "--scorer", *config.training_scorers, *rule]

    def train(self, number: int) -> list[str]:
        """Train on the pairs, from the last round's weights."""
        place = self.folder.round(number)
        last = self.folder.round(number - 1).run if number > 1 else None
        words = run_arguments(self.config, number=number, pairs=place.pairs_file, run=place.run, last=last)
        return ["train", *words]

    def export(self, number: int) -> list[str]:
        """Write the trained model as a pipeline."""
        place = self.folder.round(number)
        dtype = self.config.drawing.dtype or "fp16"
        return ["consolidate", str(place.run), str(place.model), "--format", "pipeline", "--dtype", dtype]

    def evaluate(self, number: int) -> list[str]:
        """Compare the models of all rounds until this one with the first model."""
        asked = self.config.evaluation
        models = [word for each in range(number + 1) for word in ("--model", self._model(each))]
        labels = list(map(label_of, range(number + 1)))
        names = [choice.name for choice in read_choices(self.config.training_scorers)]
        return [
            *("evaluate", *models, "--labels", *labels, "--against", BASE),
            *("--prompts", *map(resolve_asset, asked.prompts), "--seeds", str(asked.images_per_prompt)),
            *("--scorer", *self.config.judging_scorers),
            *(("--trained_on", *names) if names else ()),
            *("--out", str(self.folder.evaluation), *self._drawing()),
        ]

    def launched(self, words: Sequence[str]) -> list[str]:
        """Return the whole command of a stage, with Python or the launcher of DeepSpeed in front."""
        launch = self.config.launch
        if words[0] in ALONE or (launch.ranks == 1 and not launch.arguments):
            return [sys.executable, "-m", "ds_dpo", *words]
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        ranks = [] if launch.arguments and launch.ranks == 1 else ["--num_accelerators", str(launch.ranks)]
        return [launcher, *ranks, *launch.arguments, "--module", "ds_dpo", *words]

    def _model(self, number: int) -> str:
        return self.model.pretrained if number == 0 else str(self.folder.round(number).model)

    def _drawing(self) -> list[str]:
        drawing = self.config.drawing.model_dump(exclude_none=True)
        vae = {} if self.model.vae is None else {"vae": self.model.vae}
        return [word for name, value in {**drawing, **vae}.items() for word in (f"--{name}", str(value))]
