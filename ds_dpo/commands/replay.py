"""Repeat one step of a run in one process, to find the pair, weight or operation that is not finite.

Examples:
    python scripts/replay.py runs/my_run/non_finite/step_00001234.json
    python scripts/replay.py runs/my_run/non_finite/step_00001234.json --detect_anomaly
    python scripts/replay.py --run runs/my_run --step 1200

Exit status 0: the step ends as the run recorded it. 1: it ends differently. 2: it cannot be repeated. See
docs/non_finite.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ds_dpo.config.program_options import program_parser, user_path


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("replay", __doc__)
    parser.add_argument(
        "file", type=user_path, nargs="?", help="Record of a step that a run wrote when it ended there."
    )
    parser.add_argument("--run", type=user_path, metavar="FOLDER", help="Run folder (default: that of the record).")
    parser.add_argument("--step", type=int, metavar="N", help="Step of --run to repeat, instead of a record.")
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        metavar="FOLDER",
        help="Checkpoint with the weights to use (default: that of the step).",
    )
    parser.add_argument("--detect_anomaly", action="store_true", help="Name the module and the operation (slow).")
    arguments = parser.parse_args(argv)
    if (arguments.file is None) == (arguments.step is None):
        parser.error("give the record of a step, or --run and --step")
    if arguments.step is not None and (arguments.run is None or arguments.step < 1):
        parser.error("--step needs --run and must be 1 or more")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Repeat the step that the arguments name, and exit with the status that the docstring lists."""
    arguments = parse_arguments(argv)
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    from ds_dpo.training.replay import replay_record, replay_step

    common = {"checkpoint": arguments.checkpoint, "detect_anomaly": arguments.detect_anomaly, "say": print}
    if arguments.file is not None:
        agrees = replay_record(arguments.file, run=arguments.run, **common)
    else:
        agrees = replay_step(arguments.run, arguments.step, **common)
    sys.exit(0 if agrees else 1)
