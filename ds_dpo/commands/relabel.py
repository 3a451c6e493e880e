"""Label the pairs of a run by scorers of images (AI feedback): no image is copied.

Takes the options of the run (see ds_dpo/train.py --help) in addition to those below. Scores both images of each pair
once, on any number of ranks. If it is killed, the same command continues it. Writes OUT/labels.parquet, which training
joins to the same pairs, and OUT/report.json with the agreement with human labels. Another choice of --combine,
--least_margin, --calibrate or --human writes new labels, and scores nothing again.

    deepspeed --num_gpus 8 scripts/relabel.py --config sdxl_pickapic --scorer pickscore --out labels/pickscore
    python scripts/relabel.py --config miniature --scorer reward --human confirm --out runs/labels
    deepspeed ds_dpo/train.py --config sdxl_pickapic --data.labels labels/pickscore/labels.parquet
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ds_dpo.config.load import load_config
from ds_dpo.config.program_options import count, margin, program_parser, user_path
from ds_dpo.distributed.environment import read_environment
from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.scorers.choice import read_choices


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's own options, and the run's."""
    parser = program_parser("relabel", __doc__)
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="FOLDER", help="Folder for scores, labels and report."
    )
    parser.add_argument(
        "--scorer",
        action="append",
        required=True,
        metavar="NAME[=SOURCE]",
        help="Scorer of images, or a .yaml file with its settings; repeat the option for several. docs/scorers.md "
        "lists them.",
    )
    parser.add_argument(
        "--combine",
        choices=["vote", "unanimous"],
        default="vote",
        help="How several scorers decide. vote: the majority, with the share of votes as the probability. unanimous: "
        "the same, but pairs on which they disagree get no label (default: vote).",
    )
    parser.add_argument(
        "--least_margin",
        type=margin,
        default=0.0,
        metavar="X",
        help="Pairs whose scores differ by less get no label. X is in units of the scorer; with several scorers, in "
        "units of each one's median margin (default: 0).",
    )
    parser.add_argument(
        "--calibrate",
        choices=["temperature", "platt"],
        help="Turn margins into probabilities by a logistic curve fitted on human labels. temperature: one slope. "
        "platt: slope and offset. If unset, probabilities are shares of votes: 1 for a single scorer.",
    )
    parser.add_argument(
        "--human",
        choices=["replace", "keep", "confirm"],
        default="replace",
        help="Use of human labels. replace: none. keep: they stay, and scorers decide only ties. confirm: only pairs "
        "on which both agree get a label (default: replace).",
    )
    parser.add_argument(
        "--unit_pairs",
        type=count,
        default=1024,
        metavar="N",
        help="Pairs that are scored as a whole; a kill loses at most one such unit of each rank (default: 1024).",
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Score and label as the arguments ask."""
    own, of_run = parse_arguments(argv)
    scorers = read_choices(own.scorer)
    loaded = load_config(of_run)
    if loaded.dry_run:
        raise ConfigError("--dry_run is an option of ds_dpo/train.py; scripts/relabel.py does not have it")
    if loaded.remarks and read_environment(os.environ).rank == 0:
        print(*loaded.remarks, sep="\n", flush=True)
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    # imported late: torch takes seconds, and a mistyped option is reported at once
    from ds_dpo.feedback.relabel import program
    from ds_dpo.feedback.relabel.request import LabelOptions, Request

    options = LabelOptions(
        combination=own.combine, least_margin=own.least_margin, calibration=own.calibrate, human=own.human
    )
    program.run(Request(config=loaded.config, out=own.out, scorers=scorers, options=options, unit_pairs=own.unit_pairs))
