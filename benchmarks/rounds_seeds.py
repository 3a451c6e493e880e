"""Three on-policy rounds of the miniature over training seeds: is each round better, and does anything else get worse?

For each seed, runs the rounds of `scripts/rounds.py --config miniature` with that seed, and checks the bars: the reward
after round 3 is above that after round 1, no side effect moves by more than 5 points, and the held-out scorer does not
fall. Writes docs/rounds_seeds.md.

    python benchmarks/rounds_seeds.py [--seeds 0 1 2] [--folder runs/rounds_seeds]

Takes ten minutes of processor time per seed. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "rounds_seeds.md"
EXAMPLE = ROOT / "ds_dpo" / "assets" / "rounds" / "miniature.yaml"
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
REWARD, HELD_OUT = "reward", "faithful"
SHARES = ("diversity", "saturation", "contrast", "blank", "black")  # each 0 to 1
MOST_POINTS = 5.0


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Run the rounds of a seed, and return their record and the code that made them. Raises SystemExit if they fail."""
    place = folder / f"seed_{seed}"
    place.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    document |= {"output_dir": str(place / "rounds"), "seed": seed}
    document["run"]["options"]["seed"] = 10 * seed  # each round adds one
    (place / "rounds.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    made = place / "made.json"
    if not made.exists():
        made.write_text(json.dumps({"commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}), encoding="utf-8")
    command = [sys.executable, "scripts/rounds.py", "--config", str(place / "rounds.yaml")]
    if subprocess.run(command, cwd=ROOT, env=ENVIRONMENT).returncode:
        raise SystemExit(f"seed {seed} failed")
    record: dict[str, Any] = json.loads((place / "rounds" / "rounds.json").read_text(encoding="utf-8"))
    return {**record, **json.loads(made.read_text(encoding="utf-8"))}


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def largest_points(record: dict[str, Any]) -> tuple[float, str]:
    """Return by how many points the side effect that moved most has moved since the base, and its name."""
    base, last = record["base"]["side_effects"], record["rounds"][-1]["side_effects"]
    return max((100 * abs(last[name] - base[name]), name) for name in SHARES)


def failures(record: dict[str, Any]) -> list[str]:
    """Return each bar that a seed does not meet."""
    rounds = record["rounds"]
    points, name = largest_points(record)
    rewards = [each["scores"][REWARD] for each in rounds]
    found = [] if len(rounds) == 3 and rewards[2] > rewards[0] else [f"reward {rewards}"]
    found += [] if points <= MOST_POINTS else [f"{name} moved by {points:.1f} points"]
    return found + [each["fell"] for each in rounds if each["fell"] is not None]


def page(found: dict[int, dict[str, Any]]) -> str:
    """Return the page: a row for each seed and round, and a verdict for each seed."""
    lines = [
        "# Rounds of the miniature, over training seeds",
        "",
        "`python benchmarks/rounds_seeds.py` wrote this page: three rounds of `scripts/rounds.py --config miniature`",
        "for each seed, on one process in fp32. Each round draws 8 images of 48 prompts and trains 100 steps of 16",
        "pairs. The evaluation draws 192 images of the 24 prompts that no round draws from. Rewards are at most 2. The",
        "held-out scorer, `faithful`, is the share of clean objects, right shapes and right backgrounds, which the",
        "reward leaves out. The bars: the reward after round 3 is above that after round 1, no side effect moves by",
        "more than 5 points, and the held-out scorer never falls by more than its interval.",
        "",
        "| seed | round | reward | wins against base (95 %) | faithful | diversity |",
        "|---|---|---|---|---|---|",
    ]
    for seed, record in found.items():
        base = record["base"]
        lines.append(_row(seed, "base", base, ""))
        for each in record["rounds"]:
            over = each["over_base"][REWARD]
            wins = f"{over['win_rate']:.1%} ({over['low']:.1%} to {over['high']:.1%})"
            lines.append(_row(seed, str(each["round"]), each, wins))
    lines += ["", "| seed | date | commit | reward, round 3 less round 1 | most moved side effect | bars |"]
    lines.append("|---|---|---|---|---|---|")
    for seed, record in found.items():
        rewards = [each["scores"][REWARD] for each in record["rounds"]]
        points, name = largest_points(record)
        verdict = "; ".join(failures(record)) or "met"
        lines.append(
            f"| {seed} | {record['date']} | {record['commit']} | {rewards[-1] - rewards[0]:+.3f} | "
            f"{name}, {points:.1f} points | {verdict} |"
        )
    return "\n".join([*lines, ""])


def _row(seed: int, name: str, model: dict[str, Any], wins: str) -> str:
    scores, diversity = model["scores"], model["side_effects"]["diversity"]
    return f"| {seed} | {name} | {scores[REWARD]:.3f} | {wins} | {scores[HELD_OUT]:.3f} | {diversity:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Training seeds (default: 0 1 2).")
    parser.add_argument("--folder", type=Path, default=Path("runs/rounds_seeds"), help="Folder of the rounds.")
    parser.add_argument("--page", type=Path, default=PAGE, help="Page to write (default: docs/rounds_seeds.md).")
    arguments = parser.parse_args()
    folder = (ROOT / arguments.folder).resolve()
    text = page({seed: run_seed(folder, seed) for seed in arguments.seeds})
    arguments.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
