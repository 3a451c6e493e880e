"""What objectives.py trains: the settings of each objective, for each of the two miniatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Setting:
    """An objective with its learning rate and its own options, as in the section `objective`."""

    objective: str
    learning_rate: float
    options: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([*(f"{name} {value}" for name, value in self.options.items()), f"rate {self.learning_rate:g}"])


# The first of each objective is the chosen one; the others are what --search chose it from.
FIRST_SETTINGS: dict[str, list[Setting]] = {
    "sft": [Setting("sft", 8e-4), Setting("sft", 4e-4), Setting("sft", 2e-4), Setting("sft", 1.6e-3)],
    "dpo": [
        Setting("dpo", 4e-4, {"beta": 200}),
        Setting("dpo", 4e-4, {"beta": 500}),
        Setting("dpo", 2e-4, {"beta": 500}),
        Setting("dpo", 2e-4, {"beta": 2000}),
    ],
    "ipo": [
        Setting("ipo", 4e-4, {"beta": 50}),
        Setting("ipo", 4e-4, {"beta": 200}),
        Setting("ipo", 4e-4, {"beta": 500}),
    ],
    "hinge": [Setting("hinge", 4e-4, {"beta": 200}), Setting("hinge", 4e-4, {"beta": 500})],
    "dmpo": [Setting("dmpo", 4e-4, {"beta": 500}), Setting("dmpo", 4e-4, {"beta": 200})],
    "poly": [
        Setting("poly", 4e-4, {"beta": 200}),
        Setting("poly", 4e-4, {"beta": 500}),
        Setting("poly", 4e-4, {"beta": 500, "poly_weight": 4}),
    ],
    "alpha": [
        Setting("alpha", 4e-4, {"beta": 200}),
        Setting("alpha", 4e-4, {"beta": 500}),
        Setting("alpha", 8e-4, {"beta": 500}),
    ],
    "linear": [
        Setting("linear", 4e-4, {"beta": 50}),
        Setting("linear", 4e-4, {"beta": 200}),
        Setting("linear", 4e-4, {"beta": 500}),
        Setting("linear", 2e-4, {"beta": 500}),
    ],
    "sdpo": [
        Setting("sdpo", 4e-4, {"beta": 200}),
        Setting("sdpo", 4e-4, {"beta": 500}),
        Setting("sdpo", 8e-4, {"beta": 500}),
    ],
    "kto": [
        Setting("kto", 4e-4, {"beta": 200}),
        Setting("kto", 4e-4, {"beta": 500}),
        Setting("kto", 4e-4, {"beta": 2000}),
    ],
    "mapo": [Setting("mapo", 4e-4, {"ratio_weight": 0.1}), Setting("mapo", 4e-4, {"ratio_weight": 1})],
    "orpo": [Setting("orpo", 8e-4, {"ratio_weight": 1}), Setting("orpo", 8e-4, {"ratio_weight": 0.1})],
    "dspo": [
        Setting("dspo", 8e-4, {"beta": 500, "shift": 0.05}),
        Setting("dspo", 8e-4, {"beta": 500, "shift": 0.5}),
    ],
}
# a velocity's error is the larger one, so the betas are a tenth
FLOW_SETTINGS: dict[str, list[Setting]] = {
    "sft": [
        Setting("sft", 3.2e-3),
        Setting("sft", 1.6e-3),
        Setting("sft", 8e-4),
        Setting("sft", 4e-4),
        Setting("sft", 2e-4),
    ],
    "dpo": [
        Setting("dpo", 8e-4, {"beta": 50}),
        Setting("dpo", 1.6e-3, {"beta": 50}),
        Setting("dpo", 4e-4, {"beta": 50}),
        Setting("dpo", 4e-4, {"beta": 20}),
    ],
    "kto": [
        Setting("kto", 8e-4, {"beta": 50}),
        Setting("kto", 1.6e-3, {"beta": 50}),
        Setting("kto", 4e-4, {"beta": 20}),
    ],
    "poly": [
        Setting("poly", 1.6e-3, {"beta": 50}),
        Setting("poly", 8e-4, {"beta": 50}),
        Setting("poly", 4e-4, {"beta": 20}),
        Setting("poly", 4e-4, {"beta": 50}),
        Setting("poly", 4e-4, {"beta": 50, "poly_weight": 4}),
    ],
    "alpha": [
        Setting("alpha", 8e-4, {"beta": 50}),
        Setting("alpha", 1.6e-3, {"beta": 50}),
        Setting("alpha", 4e-4, {"beta": 50}),
        Setting("alpha", 4e-4, {"beta": 20}),
    ],
    "linear": [
        Setting("linear", 8e-4, {"beta": 20}),
        Setting("linear", 1.6e-3, {"beta": 20}),
        Setting("linear", 4e-4, {"beta": 5}),
        Setting("linear", 4e-4, {"beta": 20}),
        Setting("linear", 4e-4, {"beta": 50}),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """A miniature that is trained.

    preset: the name of its preset and of its folder in assets. denoiser: its name in the pipeline. title, sampler:
    words of its page.
    """

    preset: str
    denoiser: str
    title: str
    sampler: str
    page: Path
    settings: Mapping[str, list[Setting]]

    @property
    def base(self) -> str:
        return f"ds_dpo://assets/{self.preset}/model"


FIRST = Miniature(
    preset="miniature",
    denoiser="unet",
    title="Objectives on the miniature",
    sampler="DDIM",
    page=DOCS / "objectives_table.md",
    settings=FIRST_SETTINGS,
)
FLOW = Miniature(
    preset="miniature_flow",
    denoiser="transformer",
    title="Objectives on the flow miniature",
    sampler="Euler",
    page=DOCS / "objectives_flow.md",
    settings=FLOW_SETTINGS,
)
