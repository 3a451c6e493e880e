#!/usr/bin/env python
"""Run the quickstart with several training seeds and write their results to docs/miniature_seeds.md.

    .venv/bin/python scripts/miniature_seeds.py [--flow] [--seeds 0 1 2] [--runs runs/seeds]

With --flow it is the flow miniature, and the page is docs/miniature_flow_seeds.md. Takes five minutes per seed on two
cores. A seed whose run already has a summary is not run again. The table shows the results and the bars that the preset
must meet.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.config.version import version_text
from ds_dpo.run_folder.folder import precision_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Miniature:
    """A miniature of the quickstart: its page, title and sampler in words, and what the quickstart is given for it."""

    page: Path
    title: str
    sampler: str
    options: tuple[str, ...]
    runs: str


FIRST = Miniature(ROOT / "docs/miniature_seeds.md", "The miniature over training seeds", "DDIM", (), "runs/seeds")
FLOW = Miniature(
    *(ROOT / "docs/miniature_flow_seeds.md", "The flow miniature over training seeds", "Euler", ("--flow",)),
    "runs/flow_seeds",
)

# What the miniature must show: title, figure of a summary, least, most.
BARS = (
    ("reward gain", lambda s: s["reward_tuned"] - s["reward_base"], 0.30, None),
    ("better by > 0.1", lambda s: s["win_by_margin"], 0.70, None),
    ("worse by > 0.1", lambda s: s["loss_by_margin"], None, 0.13),
    ("valid", lambda s: s["valid"], 0.95, None),
    ("background", lambda s: s["background"], 0.95, None),
    ("tuned - SFT reward", lambda s: s["reward_tuned"] - s["reward_sft"], 0.0, None),
)


def table(summaries: dict[int, dict]) -> list[str]:
    """Return a table with a row per seed and a column per bar; a figure that misses its bar is marked."""
    bounds = [f">= {least}" if least is not None else f"<= {most}" for _, _, least, most in BARS]
    titles = ["seed", "images", "base", "tuned", "SFT", "win rate (95 %)", *(title for title, *_ in BARS)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines.append("| bar | >= 192 | | | | | " + " | ".join(bounds) + " |")
    for seed, summary in summaries.items():
        rewards = [f"{summary[name]:.3f}" for name in ("reward_base", "reward_tuned", "reward_sft")]
        interval = f"{summary['win_rate']:.3f} ({summary['win_rate_low']:.3f} to {summary['win_rate_high']:.3f})"
        cells = [str(seed), str(summary["n"]), *rewards, interval]
        for _, figure, least, most in BARS:
            value = figure(summary)
            misses = (least is not None and value < least) or (most is not None and value > most)
            cells.append(f"{value:.3f}" + (" **misses**" if misses else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=version_text(), help="Print the version and exit.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Training seeds to run.")
    parser.add_argument("--flow", action="store_true", help="Run the flow miniature.")
    parser.add_argument("--runs", help=f"Folder for the runs (default: {FIRST.runs}, or {FLOW.runs} with --flow).")
    arguments = parser.parse_args()
    miniature = FLOW if arguments.flow else FIRST
    summaries = {}
    for seed in arguments.seeds:
        run = Path(arguments.runs or miniature.runs) / f"seed_{seed}"
        summary = ROOT / run / "evaluation" / "summary.json"
        command = [str(ROOT / "scripts" / "quickstart.sh"), *miniature.options, str(run), "--seed", str(seed)]
        if not summary.exists() and subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(f"seed {seed} failed")
        summaries[seed] = json.loads(summary.read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    steps = next(iter(summaries.values()))["models"]["tuned"]["step"]
    settings = json.loads((ROOT / run / "deepspeed.json").read_text(encoding="utf-8"))
    call = " ".join(("scripts/miniature_seeds.py", *miniature.options))
    lines = [
        f"# {miniature.title}",
        "",
        f"`{call}` ran the quickstart on {datetime.now(UTC):%Y-%m-%d}",
        f"at commit {commit.stdout.strip()}, once for each training seed: {steps} steps on 2 ranks with ZeRO-2 in",
        f"{precision_of(settings)}. The evaluation draws the 24 prompts of test_unique, 8 images each, in 20",
        f"{miniature.sampler} steps at guidance 1. Rewards are means and at most 2.",
        "",
        *table(summaries),
        "",
    ]
    miniature.page.write_text("\n".join(lines), encoding="utf-8")
    print(f"\n{miniature.page.relative_to(ROOT)}\n" + "\n".join(table(summaries)))


if __name__ == "__main__":
    main()
