"""Repeat one step of a run in one process, to find the pair, weight or operation that is not finite.

Examples:
    python scripts/replay.py runs/my_run/non_finite/step_00001234.json
    python scripts/replay.py runs/my_run/non_finite/step_00001234.json --detect_anomaly
    python scripts/replay.py --run runs/my_run --step 1200

Exit status 0: the step ends as the run recorded it. 1: it ends differently. 2: it cannot be repeated. See
docs/non_finite.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.errors import run_program


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, nargs="?", help="Record of a step that a run wrote when it ended there.")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="Run folder (default: that of the record).")
    parser.add_argument("--step", type=int, metavar="N", help="Step of --run to repeat, instead of a record.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
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


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    from ds_dpo.training.replay import replay_record, replay_step

    common = {"checkpoint": arguments.checkpoint, "detect_anomaly": arguments.detect_anomaly, "say": print}
    if arguments.file is not None:
        agrees = replay_record(arguments.file, run=arguments.run, **common)
    else:
        agrees = replay_step(arguments.run, arguments.step, **common)
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    run_program(main)
