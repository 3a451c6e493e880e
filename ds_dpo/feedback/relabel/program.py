"""What scripts/relabel.py does on each rank: join the others, score, and on rank 0 write labels and report."""

from __future__ import annotations

from typing import Any

from ds_dpo.data.reading.run_pairs import open_trained_on
from ds_dpo.data.source import PairSource
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns, on_main
from ds_dpo.encoding.cache.program import join_ranks
from ds_dpo.evaluation.scorers.opening import open_scorer
from ds_dpo.feedback.relabel.labels import LABELS_NAME, label_pairs, read_scores, report_of, write_labels, write_report
from ds_dpo.feedback.relabel.making import ScoresMaking, ScoresRecord
from ds_dpo.feedback.relabel.request import Request, data_to_label
from ds_dpo.feedback.relabel.text import report_text
from ds_dpo.making.make import make
from ds_dpo.run_folder.log import RunLog


def run(request: Request) -> None:
    """Score what is not scored, then write labels and report. Raises DsDpoError with a message for the user."""
    place, device, log = join_ranks(request.config)
    source = _open_source(request, place, log)
    with node_turns(place):  # the node's first rank downloads weights; the others find them
        scorers = [open_scorer(choice, str(device)) for choice in request.scorers]
    making = ScoresMaking(
        out=request.out,
        source=source,
        scorers=scorers,
        unit_pairs=request.unit_pairs,
        workers=request.config.data.workers,
        place=place,
        say=log.line,
    )
    record = make(making)
    report = on_main(lambda: _label(request, record))
    log.line(report_text(report))
    log.line(f"train on them with --data.labels {request.out / LABELS_NAME} and the same data options")


def _open_source(request: Request, place: RankEnvironment, log: RunLog) -> PairSource:
    data = data_to_label(request.config.data)
    config = request.config.model_copy(
        update={"data": data, "held_out": request.config.held_out.model_copy(update={"share": None})}
    )
    with node_turns(place):
        return open_trained_on(config, say=log.line, in_file_order=True)


def _label(request: Request, record: ScoresRecord) -> dict[str, Any]:
    scores = read_scores(request.out, record)
    found, calibrated = label_pairs(scores, request.options)
    report = report_of(scores, found, calibrated, record=record, options=request.options)
    write_labels(request.out, scores, found, record)
    write_report(request.out, report)
    return report
