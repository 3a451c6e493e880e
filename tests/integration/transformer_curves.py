"""Runs of tiny sd3 and flux1 over 20 steps, cut and fed in other ways; some are interrupted and go on elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from invariance_cases import STEPS, Case, case
from launching import zero_stage

# larger rates let rounding grow over 20 steps, for tiny transformers have no warm start
OPTIONS: dict[str, object] = {"optimizer.learning_rate": 5e-4, "objective.beta": 200}
FAMILIES = ("sd3", "flux1")
BASELINE = "baseline"
CASES: dict[str, Case] = {
    BASELINE: case("dpo", ranks=1, stage=2, micro=4),
    "micro1_zero1_cached_latents": case("dpo", ranks=1, stage=1, micro=1, latents="cached", checkpointing="all"),
    "2_ranks_zero1": case("dpo", ranks=2, stage=1, micro=2),
    "2_ranks_zero2_cached_reference": case("dpo", ranks=2, stage=2, micro=1, residency="cached"),
    "2_ranks_zero3": case("dpo", ranks=2, stage=3, micro=1, residency="zero3", latents="cached"),
    "4_ranks_zero2_cpu": case("dpo", ranks=4, stage=2, micro=1, residency="cpu"),
    "4_ranks_zero3": case("dpo", ranks=4, stage=3, micro=1, residency="zero3", checkpointing="all"),
}
TWIN = "2_ranks_zero3"  # RESUMED is this run, interrupted


@dataclass(frozen=True)
class Start:
    """One start of a run that is interrupted: its ranks and ZeRO stage, and the step at which it stops."""

    ranks: int
    stage: int
    until: int


INTERRUPTED: dict[str, tuple[Start, ...]] = {
    "elastic_2_1_2": (Start(2, 3, 7), Start(1, 1, 14), Start(2, 2, STEPS)),
    "resumed": (Start(2, 3, 10), Start(2, 3, STEPS)),
}
# the launches of all starts: ranks, whether the cases of so many ranks are among them, and starts of INTERRUPTED
LAUNCHES: tuple[tuple[int, bool, dict[str, int]], ...] = (
    (2, True, {"elastic_2_1_2": 0, "resumed": 0}),
    (1, True, {"elastic_2_1_2": 1}),
    (4, True, {}),
    (2, False, {"elastic_2_1_2": 2, "resumed": 1}),
)


def arguments(out: Path, family: str, name: str, own: Case, **options: object) -> list[str]:
    """Spell the start of a run in out/FAMILY/NAME."""
    model = {"model.pretrained": out / f"{family}_pipeline", "model.family": family}
    whole = Case(
        own.group, own.ranks, own.stage, own.micro, own.precision, {**OPTIONS, **model, **own.options, **options}
    )
    return whole.arguments(out / family, name)


def starts(out: Path, launch: int) -> list[list[str]]:
    """Return the starts of one of LAUNCHES."""
    ranks, has_cases, interrupted = LAUNCHES[launch]
    return sorted(_starts(out, ranks, has_cases, interrupted), key=zero_stage)


def _starts(out: Path, ranks: int, has_cases: bool, interrupted: dict[str, int]) -> Iterator[list[str]]:
    for family in FAMILIES:
        for name, own in CASES.items():
            if has_cases and own.ranks == ranks:
                yield arguments(out, family, name, own)
        for name, place in interrupted.items():
            start = INTERRUPTED[name][place]
            twin = CASES[TWIN]
            own = Case("dpo", ranks, start.stage, twin.micro if name == "resumed" else 4 // ranks, options=twin.options)
            yield arguments(out, family, name, own, max_train_steps=start.until)
