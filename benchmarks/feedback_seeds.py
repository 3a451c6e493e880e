"""What AI feedback is worth on the miniature: human-like labels against a noisy scorer and a vote of three of them.

For each training seed, three runs on the same pairs: with the labels of the set (human), with those of one noisy scorer
(single), and with the share of votes of three noisy scorers as soft targets (three). A noisy scorer is the miniature's
reward with noise that turns about a fifth of the labels round: benchmarks/noisy_reward.py. Then all are compared on the
same prompts and noise. Writes docs/feedback_seeds.md.

    python benchmarks/feedback_seeds.py [--seeds 0 1 2 3 4 5] [--folder runs/feedback_seeds]

Takes six minutes per seed on two quiet cores. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ds_dpo.distributed.half_precision import faster_on_cpu  # noqa: E402 (the line above finds it)

PAGE = ROOT / "docs" / "feedback_seeds.md"
KEPT_SECTION = "## What it shows"  # is written by hand, and stays
BASE = "ds_dpo://assets/miniature/model"
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
FILES = {"bf16": "zero2_bf16", "fp32": "zero2_fp32_cpu"}
SCORERS_OF_ARM = {"single": 1, "three": 3}
ARMS = ("human", *SCORERS_OF_ARM)


def call(*words: str, ranks: int = 1) -> None:
    """Run a program of the project on N ranks. Raises SystemExit if it fails."""
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error", "--num_accelerators"]
    launcher = [sys.executable] if ranks == 1 else [*deepspeed, str(ranks), "--master_port", "29611"]
    if subprocess.run([*launcher, *words], cwd=ROOT, env=ENVIRONMENT).returncode:
        raise SystemExit(f"{' '.join(words)} failed")


def label(folder: Path, *, seed: int, scorers: int) -> Path:
    """Label the miniature's pairs by N noisy scorers; returns the file of labels."""
    settings = []
    for number in range(scorers):
        file = folder / f"noisy_{number}.yaml"
        program = f"{sys.executable} benchmarks/noisy_reward.py --seed {10 * seed + number}"
        file.write_text(f"scorer: command\nname: noisy_{number}\nsource: {program}\n", encoding="utf-8")
        settings += ["--scorer", str(file)]
    out = folder / "labels"
    if not (out / "labels.parquet").exists():
        call("scripts/relabel.py", "--config", "miniature", *settings, "--out", str(out))
    return out / "labels.parquet"


def train(folder: Path, *options: str, seed: int) -> Path:
    """Train a run as the quickstart does, and return its export."""
    export = folder / "run" / "export"
    if not export.exists():
        run = ["--config", "miniature", "--output_dir", str(folder / "run"), "--seed", str(seed)]
        run += ["--deepspeed_config", FILES[faster_on_cpu("bf16")]]
        call("ds_dpo/train.py", *run, *options, ranks=2)
        call("scripts/consolidate.py", str(folder / "run"), str(export), "--format", "pipeline")
    return export


def results_of_seed(folder: Path, *, seed: int, options: tuple[str, ...]) -> dict[str, Any]:
    """Return the summary of the evaluation of all arms of a training seed."""
    exports = {}
    for arm in ARMS:
        place = folder / f"seed_{seed}" / arm
        place.mkdir(parents=True, exist_ok=True)
        own: tuple[str, ...] = ()
        if (scorers := SCORERS_OF_ARM.get(arm)) is not None:
            own = ("--data.labels", str(label(place, seed=seed, scorers=scorers)))
            own += ("--data.confidence", "target") if scorers > 1 else ()
        exports[arm] = train(place, *options, *own, seed=seed)
    out = folder / f"seed_{seed}" / "evaluation"
    models = [word for name in (BASE, *map(str, exports.values())) for word in ("--model", name)]
    call(
        *("scripts/evaluate.py", *models, "--labels", "base", *ARMS, "--prompts", "miniature", "--scorer", "reward"),
        *("--out", str(out)),
    )
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    report = json.loads((folder / f"seed_{seed}" / "three" / "labels" / "report.json").read_text(encoding="utf-8"))
    return {"summary": summary, "labels": report}


def page(found: dict[int, dict[str, Any]], *, commit: str) -> str:
    """Return the page: a row for each seed and arm."""
    lines = [
        "# AI feedback on the miniature, over training seeds",
        "",
        f"`python benchmarks/feedback_seeds.py` ran on {datetime.now(UTC):%Y-%m-%d} at commit {commit}. Each arm",
        "trains on the same pairs: with the labels of the set (human), with those of one noisy scorer (single), and",
        "with the share of votes of three noisy scorers as soft targets (three). Rewards are means over 192 images, at",
        "most 2.",
        "",
        "| seed | arm | labels that agree with the set's | reward gain over base (95 %) | wins against base (95 %) |",
        "|---|---|---|---|---|",
    ]
    verdicts = ["", "| seed | gain of three less gain of single | three beats single |", "|---|---|---|"]
    gains = []
    for seed, one in found.items():
        agreement = one["labels"]["agreement_with_human_labels"]
        shares = {"human": 1.0, "single": agreement["noisy_0"]["accuracy"], "three": agreement["combined"]["accuracy"]}
        rows = {row["model"]: row for row in one["summary"]["comparisons"] if row["category"] is None}
        for arm in ARMS:
            row = rows[arm]
            lines.append(
                f"| {seed} | {arm} | {shares[arm]:.1%} | {row['mean_difference']:.3f} ({row['mean_low']:.3f} to "
                f"{row['mean_high']:.3f}) | {row['win_rate']:.1%} ({row['low']:.1%} to {row['high']:.1%}) |"
            )
        more = rows["three"]["mean_difference"] - rows["single"]["mean_difference"]
        gains.append(more)
        verdicts.append(f"| {seed} | {more:+.3f} | {'yes' if more > 0 else 'no'} |")
    won = sum(more > 0 for more in gains)
    verdicts += [
        "",
        f"On the mean of the seeds, three gains {fmean(gains):+.3f} on single; on {won} of {len(gains)} it is better.",
    ]
    kept = PAGE.read_text(encoding="utf-8").partition(KEPT_SECTION)[2] if PAGE.exists() else "\n"
    return "\n".join([*lines, *verdicts, "", f"{KEPT_SECTION}{kept}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(6)), help="Training seeds (default: 0 to 5)."
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/feedback_seeds"), help="Folder of the runs.")
    parser.add_argument("--page", type=Path, default=PAGE, help="Page to write (default: docs/feedback_seeds.md).")
    arguments, options = parser.parse_known_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        found[seed] = results_of_seed((ROOT / arguments.folder).resolve(), seed=seed, options=tuple(options))
        text = page(found, commit=commit.stdout.strip())
        arguments.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
