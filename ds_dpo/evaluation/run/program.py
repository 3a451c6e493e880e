"""The evaluation program: find, draw, score, compare, report; every rank calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns, on_main, raised_everywhere
from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.generate import own_resolution
from ds_dpo.evaluation.drawing.named_model import Loading, load_model
from ds_dpo.evaluation.miniature.compare import add_miniature, is_miniature
from ds_dpo.evaluation.pages.page import write_page
from ds_dpo.evaluation.results import Results
from ds_dpo.evaluation.results_file import save_results
from ds_dpo.evaluation.run.draw import Drawing, draw_missing
from ds_dpo.evaluation.run.drawn_images import DrawnImage
from ds_dpo.evaluation.run.gather import Scored, gather_results, gather_side_effects
from ds_dpo.evaluation.run.line_log import mend
from ds_dpo.evaluation.run.models import LabelledModel, find_labelled, stated_resolution
from ds_dpo.evaluation.run.prompt_sets import PromptSet, open_prompt_sets
from ds_dpo.evaluation.run.ranks import join_ranks
from ds_dpo.evaluation.run.report import (
    CSV_NAME,
    MARKDOWN_NAME,
    SUMMARY_NAME,
    printed,
    summary_of,
    write_summary,
    write_tensorboard,
)
from ds_dpo.evaluation.run.request import Request, check_request, choose_settings
from ds_dpo.evaluation.run.run_models import Exporter, export_runs, is_run
from ds_dpo.evaluation.run.score import SCORES_NAME, score_missing
from ds_dpo.evaluation.run.settings import EvaluationRecord, agree, read_record, write_record
from ds_dpo.evaluation.run.trained_on import recorded_scorers
from ds_dpo.evaluation.run.work import IMAGES_NAME, Group, list_group
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import open_scorer
from ds_dpo.evaluation.scorers.scorer import PairJudge, Scorer
from ds_dpo.making.folder import locked
from ds_dpo.precision import Precision
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import remove_partials

Opener = Callable[[ScorerChoice, str], Scorer | PairJudge]


def evaluate(
    request: Request, *, export: Exporter | None = None, say: Say = print, opener: Opener = open_scorer
) -> Results | None:
    """Evaluate models on prompt sets by scorers; returns the results on rank 0, None on the others.

    export: makes pipelines of models that are runs; without it they are refused. What request.out holds of it already
    is neither drawn nor scored again. Raises ConfigError for a request that cannot be, ModelError for a model,
    ScorerError for a scorer that cannot be used, CheckpointError for a run without a valid checkpoint.
    """
    place, device = join_ranks(request.device)
    ranks = _Ranks(request, place, device, say if place.rank == 0 else _silent, opener, export)
    return ranks.evaluate()


def _silent(line: str) -> None:
    """Say nothing: rank 0 speaks for all."""


@dataclass(frozen=True)
class _Ranks:
    request: Request
    place: RankEnvironment
    device: torch.device
    say: Say
    opener: Opener
    export: Exporter | None

    def evaluate(self) -> Results | None:
        request = self.request
        with self._in_turns():
            check_request(request)
            sets = open_prompt_sets(request.prompts, say=self.say)
        with ExitStack() as held:
            exported = self._export_runs(held)
            with self._in_turns():
                models = find_labelled(request.models, request.labels, exported=exported, variant=request.variant)
                against = _against(request, models)
            self._try_scorers()
            record = on_main(lambda: self._settle(sets, models))
            with raised_everywhere():
                if is_main():
                    if not exported:
                        held.enter_context(locked(request.out))
                    _prepare(request.out, record, say=self.say)
            groups = {
                model.label: [list_group(model.label, model.folder, each, record.settings) for each in sets]
                for model in models
            }
            self._say_what_is_to_do(sets, models, record)
            drawing = Drawing(
                out=request.out,
                settings=record.settings,
                loading=self._loading(record.settings.dtype, record.settings.scheduler),
                place=self.place,
            )
            drawn = draw_missing(drawing, models, groups, say=self.say)
            scored = [self._score(choice, groups, drawn, against) for choice in request.scorers]
            results = None
            with raised_everywhere():
                if is_main():
                    recorded = recorded_scorers(choice.name for choice in request.models)
                    trained_on = list(dict.fromkeys([*request.trained_on, *recorded]))
                    results = gather_results(
                        record, models, sets, groups, drawn, scored, against=against, trained_on=trained_on
                    )
                    self._report(results, sets, groups, drawn)
        return results

    def _export_runs(self, held: ExitStack) -> dict[str, str]:
        """Return the folders of the models that are runs, by name; with one, rank 0 holds `out` from now on."""
        request, export = self.request, self.export
        names = [choice.name for choice in request.models if export is not None and is_run(choice.name)]

        def make() -> dict[str, str]:
            if not names or export is None:
                return {}
            held.enter_context(locked(request.out))
            return export_runs(names, request.out, self._dtype(read_record(request.out)), export, say=self.say)

        return on_main(make)

    def _in_turns(self) -> Any:
        """Let a node's first rank go first: it downloads, and the others find the files."""
        return node_turns(self.place, ranks_at_once=self.place.local_world_size)

    def _settle(self, sets: Sequence[PromptSet], models: Sequence[LabelledModel]) -> EvaluationRecord:
        """Return the record of the folder with what this call adds; nothing is written yet."""
        request = self.request
        old = read_record(request.out)
        dtype = self._dtype(old)
        settings = choose_settings(
            request,
            old,
            sets,
            default_dtype=dtype,
            own_resolution=lambda: self._own_resolution(models[0], dtype),
        )
        facts = {model.folder: model.facts for model in models}
        return agree(request.out, old, settings, sets, facts, say=self.say)

    def _own_resolution(self, model: LabelledModel, dtype: Precision) -> int:
        stated = stated_resolution(model.found)
        return stated or own_resolution(load_model(model.found, self._loading(dtype, "model")))

    def _dtype(self, old: EvaluationRecord | None) -> Precision:
        """Return the precision asked for, else the recorded one, else the default of the device."""
        recorded = None if old is None else cast(Precision, old.settings.dtype)
        return self.request.dtype or recorded or ("fp32" if self.device.type == "cpu" else "fp16")

    def _loading(self, dtype: Any, sampler: str) -> Loading:
        request = self.request
        return Loading(dtype=dtype, device=self.device, variant=request.variant, vae=request.vae, sampler=sampler)

    def _say_what_is_to_do(
        self, sets: Sequence[PromptSet], models: Sequence[LabelledModel], record: EvaluationRecord
    ) -> None:
        num_prompts = sum(len(each.prompts) for each in sets)
        seeds, first = record.settings.seeds, record.settings.first_seed
        self.say(
            f"{num_prompts * seeds} images per model: {num_prompts} prompts of {', '.join(each.name for each in sets)} "
            f"x {seeds} seed(s) from {first}; {len(models)} models on {self.place.world_size} rank(s), {self.device}"
        )

    def _try_scorers(self) -> None:
        """Open each scorer once before anything is drawn, since one that lacks a package would be found late."""
        for choice in self.request.scorers:
            with self._in_turns():
                self.opener(choice, str(self.device))

    def _score(
        self,
        choice: ScorerChoice,
        groups: Mapping[str, Sequence[Group]],
        drawn: Mapping[str, DrawnImage],
        against: str,
    ) -> Scored:
        with self._in_turns():
            scorer = self.opener(choice, str(self.device))
        own = [group for of_model in groups.values() for group in of_model]
        rivals = [group for of_model in groups.values() for group, _ in zip(groups[against], of_model, strict=True)]
        scores = score_missing(scorer, own, rivals, drawn, out=self.request.out, place=self.place, say=self.say)
        return Scored.of(scorer, scores)

    def _report(
        self,
        results: Results,
        sets: Sequence[PromptSet],
        groups: Mapping[str, Sequence[Group]],
        drawn: Mapping[str, DrawnImage],
    ) -> None:
        out = self.request.out
        effects = gather_side_effects(groups, drawn, out, seeds=int(str(results.settings["seeds"])))
        summary = summary_of(results, sets, effects)
        write_tensorboard(out, results, effects)
        save_results(results, out)
        page = write_page(results, out)
        self.say(f"\n{printed(results, effects)}\n")
        if is_miniature(results):
            summary = add_miniature(summary, results, out, say=self.say)
        write_summary(out, summary, results, effects)
        for warning in results.warnings:
            self.say(f"warning: {warning}")
        self.say(f"summary: {out / SUMMARY_NAME}, {CSV_NAME}, {MARKDOWN_NAME}")
        self.say(f"page: {page}")


def _against(request: Request, models: Sequence[LabelledModel]) -> str:
    labels = [model.label for model in models]
    if request.against is None:
        return labels[0]
    if request.against not in labels:
        raise ConfigError(f"--against {request.against}: no model has this label; {', '.join(labels)} would fit")
    return request.against


def _prepare(out: Path, record: EvaluationRecord, *, say: Say) -> None:
    """Write the record, and clear away what a kill left; this process holds the folder."""
    write_record(out, record)
    try:
        remove_partials(out)
        for name in (IMAGES_NAME, SCORES_NAME):
            remove_partials(out / name, recursive=True)
    except OSError as error:
        raise ModelError(f"--out {out} cannot be cleared of partial files: {error.strerror}") from error
    for folder in (out / IMAGES_NAME, *(out / SCORES_NAME).glob("*")):
        mend(folder, say=say)
