"""The rounds: each stage runs until its end, or is found finished; a rerun goes on where the last one was."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError, DsDpoError
from ds_dpo.evaluation.run.prompt_sets import open_prompt_sets
from ds_dpo.feedback.rounds.calling import Call, call
from ds_dpo.feedback.rounds.commands import SEEDS_OF_A_SERIES, Commands
from ds_dpo.feedback.rounds.config import RoundsConfig
from ds_dpo.feedback.rounds.folder import BASE, RoundFolder, RoundsFolder, label_of
from ds_dpo.feedback.rounds.judging import judged, of_model, summary_text, why_it_fell
from ds_dpo.feedback.rounds.reading import held_out_name
from ds_dpo.feedback.rounds.run_options import identity_of, run_config
from ds_dpo.making.folder import locked
from ds_dpo.process.say import Say

DONE, STOPPED, RUNNING = "done", "stopped", "running"
FEWEST_PROMPTS = 2  # an interval resamples prompts


class StageError(DsDpoError):
    """A stage's program has failed; its own message is above."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rounds whose configuration is checked. lines: what the rounds amount to."""

    config: RoundsConfig
    run: RunConfig
    commands: Commands
    lines: Sequence[str]


def prepare(config: RoundsConfig, *, say: Say) -> Prepared:
    """Open prompt sets and check numbers, before anything is written. Raises ConfigError."""
    run = run_config(config, number=1, pairs=Path("pairs.parquet"))
    drawn = open_prompt_sets(list(map(resolve_asset, config.prompts)), say=say)
    judging = open_prompt_sets(list(map(resolve_asset, config.evaluation.prompts)), say=say)
    num_prompts = sum(len(each.prompts) for each in drawn)
    num_judging = sum(len(each.prompts) for each in judging)
    of_a_round = num_prompts * config.images_per_prompt
    if of_a_round * config.rounds > SEEDS_OF_A_SERIES:
        raise ConfigError(
            f"prompts, images_per_prompt, rounds: {of_a_round * config.rounds} images; {SEEDS_OF_A_SERIES} would fit"
        )
    if num_judging < FEWEST_PROMPTS:
        raise ConfigError("evaluation.prompts: 1 prompt gives no interval; give 2 or more")
    texts = [{prompt.text for each in sets for prompt in each.prompts} for sets in (drawn, judging)]
    both = len(texts[0] & texts[1])
    commands = Commands(
        config=config, folder=RoundsFolder(Path(config.output_dir)), model=run.model, num_prompts=num_prompts
    )
    held_out = held_out_name(config)
    by = ", ".join(config.scorers)
    lines = [
        f"{config.rounds} rounds from {run.model.pretrained}; the reference is "
        + ("that model in all of them" if config.reference == "fixed" else "the model of the last round"),
        f"each round: {of_a_round} images of {num_prompts} prompts, pairs ({config.pairs}) by {by}, "
        f"{run.max_train_steps} steps of {run.batch.pairs_per_step} pairs",
        f"each evaluation: {num_judging * config.evaluation.images_per_prompt} images a model, "
        + (f"held out: {held_out}" if held_out else "without a held-out scorer, so that the rounds never stop early"),
    ]
    if both:
        lines.append(f"warning: {both} prompts of evaluation.prompts are trained on")
    return Prepared(config=config, run=run, commands=commands, lines=lines)


def plan_lines(prepared: Prepared) -> list[str]:
    """Return the plan: what the rounds amount to, and the command of each stage."""
    commands, lines = prepared.commands, list(prepared.lines)
    for number in range(1, prepared.config.rounds + 1):
        human = ["votes on its page"] if prepared.config.is_human(number) else []
        lines.append(f"round {number}: seeds from {commands.first_seed(number)}" + "".join(f", {h}" for h in human))
        stages = (commands.draw, commands.train, commands.export, commands.evaluate)
        lines += [f"  {shlex.join(commands.launched(stage(number)))}" for stage in stages]
    return lines


def run_rounds(prepared: Prepared, *, votes: Sequence[Path], say: Say, call: Call = call) -> str:
    """Run all rounds that are not finished; returns the state at the end.

    votes: files for the round that waits for votes. Raises StageError if a stage's program fails, ConfigError if the
    folder holds other rounds, StopAskedError after a signal, DataError for votes that do not fit.
    """
    folder = prepared.commands.folder
    with locked(folder.path):
        folder.require_same(identity_of(prepared.config))
        return _Rounds(prepared=prepared, folder=folder, votes=votes, say=say, call=call).run()


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    prepared: Prepared
    folder: RoundsFolder
    votes: Sequence[Path]
    say: Say
    call: Call

    @property
    def config(self) -> RoundsConfig:
        return self.prepared.config

    def run(self) -> str:
        config = self.config
        record = self.folder.read_record() or {}
        finished: list[dict[str, Any]] = list(record.get("rounds", []))
        if len(finished) > config.rounds:
            raise ConfigError(f"rounds {config.rounds}: {len(finished)} rounds are finished; give that number or more")
        waiting = self._round_of_votes()
        for line in self.prepared.lines:
            self.say(line)
        for number in range(1, config.rounds + 1):
            if number > len(finished):
                place = self.folder.round(number)
                if not self._prepare_pairs(place, votes=self.votes if number == waiting else ()):
                    return self._write(finished, f"waiting for votes of round {number}")
                self._train(place)
                self._export(place)
                self._run(number, "evaluation", self.prepared.commands.evaluate(number))
                finished.append(self._judged(place))
                self._write(finished, RUNNING)
            why = finished[number - 1]["fell"]
            if why is not None:
                self.say(f"round {number}: stopped, because {why}; the best model is {_best(finished)}")
                return self._write(finished, STOPPED)
        self.say(f"{config.rounds} rounds are finished: {self.folder.path / 'summary.md'}")
        return self._write(finished, DONE)

    def _round_of_votes(self) -> int | None:
        """Return the round that the command's votes are for: the first one without pairs; None without votes.

        Raises ConfigError if no round waits for votes.
        """
        if not self.votes:
            return None
        numbers = range(1, self.config.rounds + 1)
        first = next((number for number in numbers if self.folder.round(number).pairs_record() is None), None)
        if first is None or not self.config.is_human(first):
            raise ConfigError(
                "--votes: no round waits for votes; leave it out, or give scorers: [human], or votes for the round"
            )
        return first

    def _prepare_pairs(self, place: RoundFolder, *, votes: Sequence[Path]) -> bool:
        """Make a round's pairs unless they exist; returns whether there are any: without votes there are none yet."""
        if place.pairs_record() is not None:
            return True
        self._run(place.number, "drawing", self.prepared.commands.draw(place.number))
        if not self.config.is_human(place.number):
            return True
        from ds_dpo.feedback.rounds.voting import pairs_of_votes, write_voting_page

        page = write_voting_page(place.path, place.pairs)
        named = [Path(name) for name in self.config.votes.get(place.number, [])]
        files = list(votes) or (named if all(path.is_file() for path in named) else [])
        if not files:
            self.say(
                f"round {place.number} waits for votes: open {page}, choose the blind vote, export the votes, and run "
                "the same command with --votes FILE"
            )
            return False
        pairs_of_votes(place.path, place.pairs, files, model=self.prepared.run.model, say=self.say)
        return True

    def _train(self, place: RoundFolder) -> None:
        last = self.prepared.run.max_train_steps
        if place.trained_steps() < last:
            self._run(place.number, "training", self.prepared.commands.train(place.number))
        reached = place.trained_steps()
        if reached < last:
            raise StageError(
                f"round {place.number}, training: ended at step {reached} of {last}; the same command goes on"
            )

    def _export(self, place: RoundFolder) -> None:
        if not place.is_exported():
            self._run(place.number, "export", self.prepared.commands.export(place.number))

    def _run(self, number: int, stage: str, words: Sequence[str]) -> None:
        self.say(f"round {number} of {self.config.rounds}: {stage}")
        status = self.call(self.prepared.commands.launched(words))
        if status != 0:
            raise StageError(
                f"round {number}, {stage}: its program ended with status {status}; its message is above. The same "
                "command goes on from there"
            )

    def _judged(self, place: RoundFolder) -> dict[str, Any]:
        pairs = place.pairs_record() or {}
        commands = self.prepared.commands
        found = {
            "round": place.number,
            "first_seed": commands.first_seed(place.number),
            "pairs": {name: pairs.get(name) for name in ("pairs", "prompts", "undecided", "rule")},
            "labels_by": sorted(pairs.get("scorers", {})),
            "steps": place.trained_steps(),
            **judged(self.folder.evaluation, place.number),
        }
        least = self.config.evaluation.least_fall
        return {**found, "fell": why_it_fell(found, held_out_name(self.config), least)}

    def _write(self, finished: Sequence[Mapping[str, Any]], state: str) -> str:
        record = {
            "state": state,
            "best": _best(finished),
            "held_out": held_out_name(self.config),
            "base": of_model(self.folder.evaluation, BASE) if finished else None,
            "rounds": list(finished),
        }
        self.folder.write_record(record, summary_text(record))
        return state


def _best(finished: Sequence[Mapping[str, Any]]) -> str:
    """Return the label of the last model before a fall of the held-out scorer."""
    return label_of(sum(each["fell"] is None for each in finished))
