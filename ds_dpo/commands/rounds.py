r"""Rounds on a model's own images: draw, score, pair, train from the last round, evaluate, and again.

One YAML file says everything: docs/rounds.md shows it, and --fields lists its fields. The rounds stop when a held-out
scorer, which is not trained on, falls. Writes OUT/round_01/pairs, run and model, and so on for each round, and
OUT/evaluation, OUT/rounds.json and OUT/summary.md. After a kill, or after votes, the same command goes on.

Examples:
    python scripts/rounds.py --config miniature --dry_run
    python scripts/rounds.py --config rounds.yaml
    python scripts/rounds.py --config rounds.yaml --votes votes-anna.jsonl votes-ben.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_dpo.config.program_options import program_parser, user_path
from ds_dpo.feedback.rounds.reading import EXAMPLES, field_lines, find_config, read_rounds


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("rounds", __doc__)
    add = parser.add_argument
    add(
        "--config",
        metavar="NAME_OR_FILE",
        help=f"YAML file of the rounds, or an example that comes with the package: {', '.join(EXAMPLES)}.",
    )
    add("--output_dir", type=user_path, metavar="DIR", help="Folder of all rounds (default: the file's).")
    add(
        "--votes",
        nargs="+",
        type=user_path,
        default=[],
        metavar="FILE",
        help="Files with people's votes for the round that waits for them.",
    )
    add("--dry_run", action="store_true", help="Print the plan and every stage's command, and write nothing.")
    add("--fields", action="store_true", help="List the fields of the file, and exit.")
    arguments = parser.parse_args(argv)
    if not arguments.fields and arguments.config is None:
        parser.error("--config is missing")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Run the rounds as the arguments ask."""
    arguments = parse_arguments(argv)
    if arguments.fields:
        print("\n".join(field_lines()))
        return
    config = read_rounds(find_config(arguments.config), output_dir=arguments.output_dir)
    from ds_dpo.feedback.rounds.program import plan_lines, prepare, run_rounds

    prepared = prepare(config, say=_say)
    if arguments.dry_run:
        print("\n".join(plan_lines(prepared)))
        return
    run_rounds(prepared, votes=[Path(name) for name in arguments.votes], say=_say)


def _say(line: str) -> None:
    print(line, flush=True)
