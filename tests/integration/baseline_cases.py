"""The runs whose loss curves are committed in tests/baselines, and how that file is read."""

import json
from pathlib import Path

from invariance_cases import COMMON, STEPS
from launching import ROOT, curve, launch, spell

BASELINES = ROOT / "tests" / "baselines" / "miniature_fp32.jsonl"
BETA = {"objective.beta": 500}
# The options without which an objective does not start; the rest are its defaults.
OBJECTIVES: dict[str, dict[str, object]] = {
    "dpo": BETA,
    "ipo": BETA,
    "hinge": BETA,
    "dmpo": BETA,
    "poly": BETA,
    "alpha": BETA,
    "linear": BETA,
    "sdpo": BETA,
    # with equal weights both images' errors rise, and the baseline stays at its least, 0
    "kto": {**BETA, "objective.undesirable_weight": 0.02},
    "mapo": {},
    "orpo": {},
    "dspo": {**BETA, "objective.shift": 0.05},
    "sft": {},
}
# A change that must be seen: the learning rate is a thousandth larger.
CONTROL = {"objective.type": "dpo", **BETA, "optimizer.learning_rate": 2.002e-4}


def arguments(run: Path, options: dict[str, object]) -> list[str]:
    """Spell one start of train.py: 20 steps of 4 pairs, one micro-batch each, on one rank with ZeRO-1 in fp32."""
    common = {**COMMON, "output_dir": run, "deepspeed_config": "zero1_fp32_cpu", "batch.micro_batch_pairs": 4}
    return spell({**common, **options})


def train_all(out: Path) -> dict[str, list[float]]:
    """Train each objective, and the control, in one launch. Returns the losses of each, by name."""
    cases = {name: {"objective.type": name, **options} for name, options in OBJECTIVES.items()} | {"control": CONTROL}
    launch([arguments(out / name, options) for name, options in cases.items()], out, ranks=1)
    return {name: curve(out / name) for name in cases}


def train_in_two_halves(run: Path) -> list[float]:
    """Train dpo on two ranks with ZeRO-2, saved and ended at half of the steps, and gone on with from there."""
    two_ranks = {"deepspeed_config": "zero2_fp32_cpu", "batch.micro_batch_pairs": 2, **BETA}
    halves = [{"max_train_steps": STEPS // 2}, {}]
    launch([arguments(run, {**two_ranks, **half}) for half in halves], run.parent, ranks=2)
    return curve(run)


def read_baselines() -> dict[str, list[float]]:
    """Return the committed losses of each objective."""
    rows = [json.loads(line) for line in BASELINES.read_text(encoding="utf-8").splitlines()]
    return {row["objective"]: row["loss"] for row in rows}


def write_baselines(curves: dict[str, list[float]]) -> None:
    """Replace the committed losses: a line for each objective."""
    lines = [json.dumps({"objective": name, "loss": curves[name]}) for name in OBJECTIVES]
    BASELINES.write_text("\n".join(lines) + "\n", encoding="utf-8")
