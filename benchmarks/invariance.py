#!/usr/bin/env python
"""Train one run in every way that must not matter and write how far the curves are apart to docs/invariance.md.

    python benchmarks/invariance.py [--only cuts references latents statistics bf16] [--runs runs/invariance]

The cases, the limits and the harness are those of tests/integration/test_invariance.py, which runs a choice of them;
here is the product of the factors that can meet. What is done is not done again, and the page holds what there is.
About 25 minutes on two quiet cores, of which bf16 takes 10.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration")]

from invariance_cases import (  # noqa: E402 (the line above finds it)
    BASELINES,
    CONTROL,
    LARGEST_DEVIATION,
    LARGEST_DRIFT,
    LARGEST_MEAN_RESIDUAL,
    PAIRS_PER_STEP,
    RESIDENCIES,
    STEPS,
    Case,
    case,
    make_caches,
    residuals,
)
from launching import curve, launch, metrics, zero_stage  # noqa: E402

PAGE = ROOT / "docs" / "invariance.md"
KEPT_SECTION = "## Notes"
STAGES = (1, 2, 3)
CUTS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))  # ranks, micro-batch
BF16_STEPS, BF16_BLOCK = 200, 20
BF16_BASELINE = "bf16_1_ranks_zero2_micro4"
STUDENT_9 = 2.262  # 95 % of Student's t with 9 degrees of freedom: ten blocks


def cuts() -> Iterator[tuple[str, Case]]:
    for stage, (ranks, micro), checkpointing in product(STAGES, CUTS, (False, True)):
        yield named("dpo", ranks=ranks, stage=stage, micro=micro, checkpointing=checkpointing)


def references() -> Iterator[tuple[str, Case]]:
    for group, residency, stage, checkpointing in product(("dpo", "lora"), RESIDENCIES, STAGES, (False, True)):
        if (group, residency) != ("dpo", "adapter"):
            own = {"stage": stage, "residency": residency, "checkpointing": checkpointing}
            yield named(group, ranks=2, micro=1, **own)


def latents() -> Iterator[tuple[str, Case]]:
    for stage, (ranks, micro) in product(STAGES, ((1, 4), (2, 2), (4, 1))):
        yield named("dpo", ranks=ranks, stage=stage, micro=micro, latents="cached")


def statistics() -> Iterator[tuple[str, Case]]:
    for group, (ranks, micro) in product(("kto", "automatic_beta"), CUTS):
        yield named(group, ranks=ranks, stage=2, micro=micro)
    for group, stage in product(("kto", "automatic_beta"), (1, 3)):
        yield named(group, ranks=2, stage=stage, micro=1)


def bf16() -> Iterator[tuple[str, Case]]:
    """By trend: rounding of weights and predictions to 8 bits moves every step's loss."""
    for stage, ranks, micro in ((2, 1, 4), (2, 1, 1), (1, 2, 1), (2, 2, 2), (3, 2, 1)):
        options = {"max_train_steps": BF16_STEPS, "schedule.decay_steps": 2 * BF16_STEPS}
        yield f"bf16_{ranks}_ranks_zero{stage}_micro{micro}", Case("dpo", ranks, stage, micro, "bf16", options)


FACTORS = {"cuts": cuts, "references": references, "latents": latents, "statistics": statistics, "bf16": bf16}
TITLES = {
    "cuts": "ZeRO stage x ranks x micro-batch x checkpointing",
    "references": "residency x ZeRO stage x checkpointing, full and LoRA, 2 ranks",
    "latents": "cached latents x ZeRO stage x ranks",
    "statistics": "kto and automatic beta x ranks x micro-batch x ZeRO stage",
}


def named(group: str, *, ranks: int, stage: int, micro: int, **factors: object) -> tuple[str, Case]:
    words = [name if value is True else f"{value}_{name}" for name, value in factors.items() if value]
    name = "_".join([group, f"{ranks}_ranks", f"zero{stage}", f"micro{micro}", *words])
    return name, case(group, ranks=ranks, stage=stage, micro=micro, **factors)


# ---- training ----


def train_all(cases: Mapping[str, Case], folder: Path) -> None:
    """Train what has not its last step yet: one launch for each number of ranks."""
    waiting = {name: one for name, one in cases.items() if not is_done(folder / name, one)}
    print(f"{len(cases) - len(waiting)} of {len(cases)} runs are done", flush=True)
    if any("CACHE" in str(value) for one in waiting.values() for value in one.options.values()):
        make_caches(folder, BASELINES["dpo"].arguments(folder, "unused"))
    for ranks in sorted({one.ranks for one in waiting.values()}):
        starts = [one.arguments(folder, name) for name, one in waiting.items() if one.ranks == ranks]
        print(f"{datetime.now(UTC):%H:%M:%S} {len(starts)} runs on {ranks} ranks", flush=True)
        launch(sorted(starts, key=zero_stage), folder, ranks=ranks)


def is_done(run: Path, one: Case) -> bool:
    steps = int(one.options.get("max_train_steps", STEPS))  # type: ignore[call-overload]
    return (run / "metrics.jsonl").exists() and len(metrics(run)) == steps


# ---- the page ----


def write_page(folder: Path) -> str:
    """Write the page from all finished runs, its last section as it stands; returns the new part."""
    kept = PAGE.read_text(encoding="utf-8").partition(KEPT_SECTION)[2] if PAGE.exists() else "\n"
    done = {factor: {n: c for n, c in cases() if is_done(folder / n, c)} for factor, cases in FACTORS.items()}
    lines = [
        "# The same curve on any ranks, at any ZeRO stage, with any reference",
        "",
        f"`benchmarks/invariance.py` trained the miniature on {datetime.now(UTC):%Y-%m-%d} at commit {commit()}:",
        f"{STEPS} steps of {PAIRS_PER_STEP} pairs in fp32 with stage3_param_persistence_threshold 0. A residual is",
        "a run's loss in a step minus that of its group's baseline (1 rank, ZeRO-2, no accumulation, no checkpointing,",
        f"replicated reference, latents encoded online). The limits are {LARGEST_DEVIATION:g} for any step,",
        f"{LARGEST_MEAN_RESIDUAL:g} for the mean, and {LARGEST_DRIFT:g} for the drift, the rise or fall of the",
        "residuals' least-squares line over the run.",
        "",
        "| factors | runs | largest residual | worst mean | worst drift | beyond a limit |",
        "|---|---|---|---|---|---|",
    ]
    details = []
    for factor, title in TITLES.items():
        found = {name: residuals(folder / name, folder / one.group) for name, one in done[factor].items()}
        if found:
            worst = [max(abs(getattr(each, name)) for each in found.values()) for name in ("largest", "mean", "drift")]
            beyond = [name for name, each in found.items() if not each.are_rounding]
            figures = " | ".join(f"{value:.1e}" for value in worst)
            total = sum(1 for _ in FACTORS[factor]())
            lines.append(f"| {title} | {len(found)} of {total} | {figures} | {', '.join(beyond) or 'none'} |")
        details += [f"| {n} | {e.largest:.1e} | {e.mean:+.1e} | {e.drift:+.1e} |" for n, e in found.items()]
    control = residuals(folder / "control", folder / "dpo")
    lines += [
        f"| for comparison: a learning rate that is 0.1 % larger | 1 | {control.largest:.1e} | {control.mean:.1e} | "
        f"{control.drift:.1e} | yes, as it must be |",
        "",
        *bf16_lines(folder, done["bf16"]),
        "## Every run",
        "",
        "| run | largest | mean | drift |",
        "|---|---|---|---|",
        *details,
        "",
    ]
    text = "\n".join(lines)
    PAGE.write_text(f"{text}\n{KEPT_SECTION}{kept}", encoding="utf-8")
    return text


def bf16_lines(folder: Path, done: Mapping[str, Case]) -> list[str]:
    """Mean residuals with the interval that ten blocks of steps give, as those of neighbouring steps go together."""
    if BF16_BASELINE not in done:
        return []
    baseline = np.array(curve(folder / BF16_BASELINE))
    lines = [
        f"## bf16, {BF16_STEPS} steps, by trend",
        "",
        f"The baseline is {BF16_BASELINE}, whose losses have a standard deviation of {baseline.std():.2f}. The",
        f"95 % intervals are from the means of blocks of {BF16_BLOCK} steps.",
        "",
        "| run | largest | mean residual | first half | second half |",
        "|---|---|---|---|---|",
    ]
    for name in done:
        if name != BF16_BASELINE:
            differences = np.array(curve(folder / name)) - baseline
            halves = differences[: BF16_STEPS // 2].mean(), differences[BF16_STEPS // 2 :].mean()
            blocks = differences.reshape(-1, BF16_BLOCK).mean(1)
            half_width = STUDENT_9 * blocks.std(ddof=1) / np.sqrt(len(blocks))
            mean = f"{differences.mean():+.4f} +- {half_width:.4f}"
            largest = f"{np.abs(differences).max():.3f}"
            lines.append(f"| {name} | {largest} | {mean} | {halves[0]:+.4f} | {halves[1]:+.4f} |")
    return [*lines, ""]


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FACTORS), choices=list(FACTORS), metavar="FACTORS")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "invariance", help="Folder for the runs.")
    arguments = parser.parse_args()
    folder = arguments.runs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cases = {**BASELINES, "control": CONTROL}
    for factor in arguments.only:
        cases.update(FACTORS[factor]())
    train_all(cases, folder)
    print(write_page(folder))


if __name__ == "__main__":
    main()
