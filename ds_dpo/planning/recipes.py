"""Settings that have been trained with, as their authors ship them, and what of a run lies far from all of them.

Betas are in the unit of this project (1/2 beta on the difference of mean squared errors): a recipe whose code has no
1/2 stands here with twice its number. Learning rates are what the optimizer saw: diffusers' and the authors' scale_lr
is multiplied in. The paper's own text (2000/beta x 2.048e-8) is left out: the authors' launchers have 1000 times that,
and a rate that forgot scale_lr is what such a warning is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ds_dpo.config.asset_paths import ASSET_PREFIX
from ds_dpo.config.run import RunConfig

FAR = 10.0  # a value this many times from every recipe's is told
Trained = Literal["full", "lora"]
Model = Literal["stable_diffusion", "miniature"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One setting. None: the source leaves it to the user, or the objective has none."""

    objective: str
    source: str
    beta: float | None
    learning_rate: float
    optimizer: str
    pairs_per_step: int | None
    trained: Trained = "full"
    model: Model = "stable_diffusion"


# Objectives whose beta means the same and whose gradients at the start differ by a factor of 2 at most.
FAMILIES = {name: "dpo" for name in ("dpo", "ipo", "hinge", "dmpo", "sdpo")}

RECIPES = (
    Recipe(
        objective="dpo",
        source="SalesforceAIResearch/DiffusionDPO sdxl.sh, turbo.sh",
        beta=5000,
        learning_rate=2.048e-5,
        optimizer="Adafactor",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="dpo",
        source="SalesforceAIResearch/DiffusionDPO sd15.sh",
        beta=5000,
        learning_rate=2.048e-5,
        optimizer="AdamW",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="dpo",
        source="JaydenLyh/InPO sdxl.sh, 8 GPUs",
        beta=5000,
        learning_rate=1.024e-5,
        optimizer="Adafactor",
        pairs_per_step=1024,
    ),
    Recipe(
        objective="dpo",
        source="okotaku/diffengine stable_diffusion_xl_dpo, 8 GPUs",
        beta=5000,
        learning_rate=1e-5,
        optimizer="Adafactor",
        pairs_per_step=32,
    ),
    Recipe(
        objective="dpo",
        source="huggingface/diffusers diffusion_dpo, SDXL, 1 GPU",
        beta=5000,
        learning_rate=1e-5,
        optimizer="8-bit AdamW",
        pairs_per_step=16,
        trained="lora",
    ),
    Recipe(
        objective="dpo",
        source="huggingface/diffusers diffusion_dpo, SD1.5, 1 GPU",
        beta=5000,
        learning_rate=1e-5,
        optimizer="8-bit AdamW",
        pairs_per_step=32,
        trained="lora",
    ),
    Recipe(
        objective="dpo",
        source="G-U-N/Diffusion-NPO, SDXL, 1 GPU",
        beta=2000,
        learning_rate=5e-6,
        optimizer="8-bit AdamW",
        pairs_per_step=60,
        trained="lora",
    ),
    Recipe(
        objective="sdpo",
        source="AIDC-AI/Diffusion-SDPO sdxl_diffusion_dpo.sh, mu 0.6, 8 GPUs",
        beta=5000,
        learning_rate=2.048e-6,
        optimizer="Adafactor",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="sdpo",
        source="AIDC-AI/Diffusion-SDPO sd15_diffusion_dpo.sh, mu 0.9, 8 GPUs",
        beta=5000,
        learning_rate=2.048e-5,
        optimizer="AdamW",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="dmpo",
        source="AIDC-AI/Diffusion-SDPO sdxl_dmpo.sh, 8 GPUs",
        beta=6000,
        learning_rate=2.048e-6,
        optimizer="Adafactor",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="dmpo",
        source="AIDC-AI/Diffusion-SDPO sd15_dmpo.sh, 8 GPUs",
        beta=2000,
        learning_rate=2.048e-5,
        optimizer="AdamW",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="dspo",
        source="AIDC-AI/Diffusion-SDPO sd15_dspo.sh, 8 GPUs",
        beta=0.001,
        learning_rate=2.048e-5,
        optimizer="AdamW",
        pairs_per_step=2048,
    ),
    Recipe(
        objective="kto",
        source="jacklishufan/diffusion-kto example.sh, beta 1000 without 1/2, 2 images on each of 4 GPUs",
        beta=2000,
        learning_rate=1e-7,
        optimizer="8-bit AdamW",
        pairs_per_step=4,
    ),
    Recipe(
        objective="mapo",
        source="mapo-t2i/mapo README, 8 GPUs",
        beta=None,
        learning_rate=1e-5,
        optimizer="8-bit AdamW",
        pairs_per_step=128,
    ),
    Recipe(
        objective="mapo",
        source="mapo-t2i/mapo README, 1 GPU",
        beta=None,
        learning_rate=1e-5,
        optimizer="8-bit AdamW",
        pairs_per_step=16,
        trained="lora",
    ),
    Recipe(
        objective="orpo",
        source="huggingface/diffusers diffusion_orpo, 1 GPU",
        beta=None,
        learning_rate=1e-5,
        optimizer="8-bit AdamW",
        pairs_per_step=16,
        trained="lora",
    ),
    Recipe(
        objective="dpo",
        source="docs/miniature_seeds.md",
        beta=500,
        learning_rate=2e-4,
        optimizer="AdamW",
        pairs_per_step=16,
        model="miniature",
    ),
    Recipe(
        objective="sft",
        source="docs/miniature_seeds.md",
        beta=None,
        learning_rate=2e-4,
        optimizer="AdamW",
        pairs_per_step=16,
        model="miniature",
    ),
)


def recipes_like(config: RunConfig) -> list[Recipe]:
    """Return the known recipes that a run can be compared with: its objective's or family's, full or LoRA."""
    family = FAMILIES.get(config.objective.type, config.objective.type)
    trained = "full" if config.adapter.type == "none" else "lora"
    model = "miniature" if config.model.pretrained.startswith(f"{ASSET_PREFIX}assets/miniature") else "stable_diffusion"
    return [
        recipe
        for recipe in RECIPES
        if FAMILIES.get(recipe.objective, recipe.objective) == family
        and recipe.trained == trained
        and recipe.model == model
    ]


def far_from_recipes(config: RunConfig) -> list[str]:
    """Return a line for each of beta, learning rate and pairs per step that is more than 10x from every known recipe.

    None if it is near one, or where no recipe is known.
    """
    values = {
        "objective.beta": getattr(config.objective, "beta", None),
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "batch.pairs_per_step": config.batch.pairs_per_step,
    }
    lines = []
    for name, value in values.items():
        known = _known(recipes_like(config), name.rpartition(".")[2])
        if value is None or not known or any(1 / FAR <= value / number <= FAR for number in known):
            continue
        nearest = min(known, key=lambda number: max(value / number, number / value))
        lines.append(
            f"warning: {name} {value:g} is more than {FAR:g}x from every known recipe of this kind; the nearest is "
            f"{nearest:g} ({known[nearest]})"
        )
    return lines


def _known(recipes: list[Recipe], name: str) -> Mapping[float, str]:
    """Return the values that recipes have of a setting, each with a source."""
    return {getattr(recipe, name): recipe.source for recipe in recipes if getattr(recipe, name) is not None}
