"""Do one step of a run again, on one process, to see which pair, weight or operation is not finite.

Examples:
    python scripts/replay.py runs/my_run/non_finite/step_00001234.json
    python scripts/replay.py runs/my_run/non_finite/step_00001234.json --detect_anomaly
    python scripts/replay.py --run runs/my_run --step 1200

Status 0: it ends as the run's record says, 1: it does not, 2: it cannot be done. docs/non_finite.md tells more.
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
    parser.add_argument("file", type=Path, nargs="?", help="record of a step, as a run writes it when it ends at one")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="of the run; default: where the record lies")
    parser.add_argument("--step", type=int, metavar="N", help="any step of --run, in place of a record")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="weights; default: those of the step")
    parser.add_argument("--detect_anomaly", action="store_true", help="name the module and operation; slow")
    arguments = parser.parse_args(argv)
    if (arguments.file is None) == (arguments.step is None):
        parser.error("give the record of a step, or --run and --step")
    if arguments.step is not None and (arguments.run is None or arguments.step < 1):
        parser.error("--step needs --run, and counts from 1")
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
