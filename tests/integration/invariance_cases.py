"""The runs whose curves must be one and the same, as tables: each factor against the baseline of its group.

A run is cut in another way (ZeRO stage, ranks, micro-batch), computed in another way (checkpointing) or fed from
another place (reference, latents); its losses must stay. test_invariance.py trains CASES, the smallest set that touches
each factor, and benchmarks/invariance.py the products of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import forked
import numpy as np
from launching import ENVIRONMENT, ROOT, curve, spell

STEPS, PAIRS_PER_STEP = 20, 4
LARGEST_DEVIATION = 1e-4  # of one step's loss
LARGEST_MEAN_RESIDUAL = 1e-5
# Of the residual from the first step to the last, on its least-squares line. A LoRA with automatic beta that resumes
# at other ZeRO stages reaches 2.1e-5 on an AMD EPYC; each change of the page's table on sensitivity exceeds a limit.
LARGEST_DRIFT = 2.5e-5
COMMON = {
    "config": "miniature",
    "max_train_steps": STEPS,
    "batch.pairs_per_step": PAIRS_PER_STEP,
    "data.max_rows": 100,  # more pairs than are seen, and few to put into a cache
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 2 * STEPS,
    "cadence.log_every_steps": STEPS,
    "cadence.save_every_steps": STEPS,
    "cadence.sample_every_steps": "none",
}
# What a group's runs have in common. Low-rank layers start at 0: they need a larger rate to move as far.
GROUPS: dict[str, dict[str, object]] = {
    "dpo": {},
    "lora": {"adapter.type": "lora", "adapter.rank": 4, "optimizer.learning_rate": 1e-2},
    # with equal weights both images' errors rise, and the baseline stays at its least, 0
    "kto": {"objective.type": "kto", "objective.beta": 500, "objective.undesirable_weight": 0.02},
    "automatic_beta": {"objective.target_gradient_factor": 0.3, "objective.gap_decay": 0.8},
}
# CACHE stands for the folder that make_caches fills.
LATENTS = {"online": {}, "cached": {"data.cache": "CACHE/latents"}}
RESIDENCIES: dict[str, dict[str, object]] = {
    "replicated": {},
    "zero3": {"reference.residency": "zero3"},
    "cpu": {"reference.residency": "cpu"},
    "adapter": {"reference.residency": "adapter"},
    "cached": {"reference.residency": "cached", "reference.cache": "CACHE/reference"},
}


@dataclass(frozen=True)
class Case:
    """One run. options: of train.py, beside COMMON and the group's."""

    group: str = "dpo"
    ranks: int = 1
    stage: int = 2
    micro: int = PAIRS_PER_STEP
    precision: str = "fp32_cpu"
    options: Mapping[str, object] = field(default_factory=dict)

    def arguments(self, out: Path, name: str) -> list[str]:
        """Spell its start in the run folder out/name, with the caches in out."""
        settings = {
            **COMMON,
            "output_dir": out / name,
            "deepspeed_config": f"zero{self.stage}_{self.precision}",  # these shard everything, however small
            "batch.micro_batch_pairs": self.micro,
            **GROUPS[self.group],
            **self.options,
        }
        return [text.replace("CACHE/", f"{out}/") for text in spell(settings)]


def case(group: str, *, ranks: int, stage: int, micro: int, **options: object) -> Case:
    """options: residency, latents, checkpointing, as the tables above name them."""
    residency, latents = options.pop("residency", "replicated"), options.pop("latents", "online")
    checkpointing = {"model.gradient_checkpointing": options.pop("checkpointing", "none")}
    own = {**RESIDENCIES[residency], **LATENTS[latents], **checkpointing, **options}
    return Case(group=group, ranks=ranks, stage=stage, micro=micro, options=own)


SOME_BLOCKS = 5  # of the miniature's 11
BASELINES = {group: Case(group) for group in GROUPS}
CASES: dict[str, Case] = {
    "micro1_checkpointing": case("dpo", ranks=1, stage=2, micro=1, checkpointing="true"),
    "some_blocks_checkpointing": case("dpo", ranks=1, stage=2, micro=4, checkpointing=SOME_BLOCKS),
    "cpu_reference_cached_latents": case("dpo", ranks=1, stage=2, micro=4, residency="cpu", latents="cached"),
    "2_ranks_zero1": case("dpo", ranks=2, stage=1, micro=2),
    "2_ranks_zero2_cached_reference": case("dpo", ranks=2, stage=2, micro=1, residency="cached"),
    "2_ranks_zero3_checkpointing": case("dpo", ranks=2, stage=3, micro=2, checkpointing="all"),
    "4_ranks_zero2": case("dpo", ranks=4, stage=2, micro=1),
    "4_ranks_zero3_reference_too": case("dpo", ranks=4, stage=3, micro=1, residency="zero3"),
    "lora_zero1_adapter_reference": case("lora", ranks=1, stage=1, micro=2, residency="adapter"),
    "lora_2_ranks_zero3_checkpointing": case(
        "lora", ranks=2, stage=3, micro=1, residency="adapter", checkpointing="auto"
    ),
    "kto_micro1": case("kto", ranks=1, stage=2, micro=1),
    "kto_2_ranks": case("kto", ranks=2, stage=2, micro=1),
    "automatic_beta_micro1": case("automatic_beta", ranks=1, stage=2, micro=1),
}
# A change that must be seen: the learning rate is a thousandth larger.
CONTROL = Case(options={"optimizer.learning_rate": 2.002e-4})

# (group, residency): the ZeRO stages of its runs, with c where the policy recomputes. Each residency beside each stage,
# and each with and without recomputing; benchmarks/invariance.py trains all of the products.
STARTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("dpo", "replicated"): ("1", "2c", "3"),
    ("dpo", "zero3"): ("1c", "2", "3c"),
    ("dpo", "cpu"): ("2", "3c"),
    ("dpo", "cached"): ("2",),
    ("lora", "replicated"): ("2",),
    ("lora", "zero3"): ("3c",),
    ("lora", "adapter"): ("1c", "2", "3"),
    ("lora", "cached"): ("2",),
}
# Cached latents spare these short runs the encoders; the cache of errors is of online ones.
STEP_ONE: dict[str, Case] = {
    f"step_one_{group}_{residency}_zero{stage[0]}{'_checkpointing' * stage.endswith('c')}": case(
        group,
        ranks=2,
        stage=int(stage[0]),
        micro=2,
        residency=residency,
        latents="online" if residency == "cached" else "cached",
        checkpointing="all" if stage.endswith("c") else "none",
        max_train_steps=1,
    )
    for (group, residency), stages in STARTS.items()
    for stage in stages
}


def make_caches(out: Path, arguments: list[str]) -> None:
    """Encode a run's pairs, and compute its reference's errors, as a user does. arguments: those of its start."""
    for own in (["--dtype=fp32", f"--out={out / 'latents'}"], ["--reference", f"--out={out / 'reference'}"]):
        done = forked.run([str(ROOT / "scripts" / "cache.py"), *arguments, *own], env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@dataclass(frozen=True)
class Residuals:
    """How a curve differs from its baseline, step by step."""

    largest: float
    mean: float
    drift: float

    @property
    def are_rounding(self) -> bool:
        return (
            self.largest < LARGEST_DEVIATION
            and abs(self.mean) < LARGEST_MEAN_RESIDUAL
            and abs(self.drift) < LARGEST_DRIFT
        )


def residuals(run: Path, baseline: Path, name: str = "loss") -> Residuals:
    """Compare two curves of a quantity.

    Rounding moves single steps to either side; a gradient that is lost, counted twice or scaled moves all of them to
    one side, and further with each step: mean and drift see that long before the largest does.
    """
    differences = np.subtract(curve(run, name), curve(baseline, name))
    slope, _ = np.polyfit(np.arange(len(differences)), differences, 1)
    return Residuals(
        largest=float(np.abs(differences).max()),
        mean=float(differences.mean()),
        drift=float(slope * (len(differences) - 1)),
    )
