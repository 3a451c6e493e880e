"""A round whose labels are people's votes: the blind page of its images, and the pairs that votes make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import DataError
from ds_dpo.evaluation.pages.page import write_page
from ds_dpo.evaluation.results import ImageRow, ModelRow, Results
from ds_dpo.evaluation.results_file import load_results, save_results
from ds_dpo.evaluation.votes.human import human_comparisons, remarks
from ds_dpo.evaluation.votes.vote_files import read_votes
from ds_dpo.feedback.pairs.forming import FormedPair
from ds_dpo.feedback.pairs.names import PAIRS_NAME, RECORD_NAME
from ds_dpo.feedback.rounds.config import HUMAN
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file

SIDES = ("first", "second")  # in the place of two models' labels: both images are of one model


def write_voting_page(folder: Path, pairs: Path) -> Path:
    """Write the round's page for blind votes, and the results beneath it; returns the page's path.

    folder: of the round. pairs: folder inside it with the evaluation of the drawn images. Raises DataError or
    ConfigError as reading and writing do.
    """
    results = _as_rivals(load_results(pairs), below=pairs.relative_to(folder).as_posix())
    save_results(results, folder)
    return write_page(results, folder)


def _as_rivals(drawn: Results, *, below: str) -> Results:
    """Return results in which the images 2k and 2k + 1 of a prompt are those of two models, under one seed."""
    by_prompt: dict[int, list[ImageRow]] = {}
    for image in drawn.images:
        by_prompt.setdefault(image.prompt, []).append(image)
    images = [
        replace(image, model=side, seed=both[0].seed, path=f"{below}/{image.path}")
        for own in by_prompt.values()
        for both in _couples(own)
        for side, image in zip(SIDES, both, strict=True)
    ]
    return replace(
        drawn,
        # votes of the evaluation of these images would compare other things
        evaluation=hashlib.sha256(f"rounds {drawn.evaluation}".encode()).hexdigest()[:16],
        models=[ModelRow(label=side, source=drawn.models[0].source) for side in SIDES],
        images=images,
        comparisons=[],
        warnings=[],
    )


def _couples(images: Sequence[ImageRow]) -> Iterator[tuple[ImageRow, ImageRow]]:
    ordered = sorted(images, key=lambda image: image.seed)
    return zip(ordered[::2], ordered[1::2], strict=False)


def pairs_of_votes(folder: Path, pairs: Path, files: Sequence[Path], *, model: ModelConfig, say: Say) -> None:
    """Write pairs/pairs.parquet and pairs/pairs.json from the votes on the round's page.

    model: whose VAE all models of the rounds have. Several raters decide by their mean; a pair on which they are even
    is left out. Raises DataError for votes of another page, and if no pair is left.
    """
    from ds_dpo.feedback.pairs.writing import write_pairs
    from ds_dpo.models.loading import latent_shape

    page = load_results(folder)
    drawn = {f"{pairs.relative_to(folder).as_posix()}/{image.path}": image for image in load_results(pairs).images}
    votes = read_votes(page, files)
    labels: dict[tuple[str, str], list[float]] = {}
    for vote in votes.votes:
        labels.setdefault(vote.pair, []).append(vote.label)
    formed, undecided = [], 0
    prompts = [row.prompt for row in page.prompts]
    for (first, second), of_pair in sorted(labels.items(), key=lambda item: (drawn[item[0][0]].prompt, item[0])):
        share = sum(of_pair) / len(of_pair)
        if share == 0.5:
            undecided += 1
            continue
        better, worse = (first, second) if share > 0.5 else (second, first)
        formed.append(
            FormedPair(
                prompt=prompts[drawn[better].prompt],
                chosen=drawn[better],
                rejected=drawn[worse],
                margin=abs(2 * share - 1),
                confidence=max(share, 1 - share),
            )
        )
    if not formed:
        raise DataError(f"{', '.join(map(str, files))}: no pair is left; raters are even on all {undecided} of them")
    for line in remarks(human_comparisons(page, files)):
        say(line)
    side = int(str(page.settings["resolution"]))
    write_pairs(pairs / PAIRS_NAME, formed, folder=pairs, noise_shape=latent_shape(model, (side, side)))
    record: Mapping[str, object] = {
        "pairs": len(formed),
        "undecided": undecided,
        "unscored_images": 0,
        "rule": "votes",
        "prompts": len({pair.prompt for pair in formed}),
        "evaluation": page.evaluation,
        "scorers": {HUMAN: {"votes": len(votes.votes), "raters": len({vote.rater for vote in votes.votes})}},
        "settings": dict(page.settings),
    }
    replace_file(pairs / RECORD_NAME, json.dumps(record, indent=2) + "\n", sync=True)
    say(f"{len(formed)} pairs of {record['prompts']} prompts by votes; {undecided} on which raters are even")
