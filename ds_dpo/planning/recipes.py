"""Published settings, read from assets/recipes.yaml, and the values of a run that are far from all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from ds_dpo.config.asset_paths import ASSET_PREFIX, PACKAGE
from ds_dpo.config.documents import read_yaml
from ds_dpo.config.families import LIMITS
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.config.run import RunConfig

RECIPES_FILE = PACKAGE / "assets" / "recipes.yaml"
FAR = 10.0  # a value this many times from every recipe's is far


class Recipe(BaseModel):
    """One setting; the head of assets/recipes.yaml explains its fields. None: the source leaves it to the user."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    objective: str
    source: str
    beta: float | None = Field(default=None, gt=0)
    learning_rate: float = Field(gt=0)
    optimizer: str
    pairs_per_step: int | None = Field(default=None, gt=0)
    trained: Literal["full", "lora"] = "full"
    model: Literal["stable_diffusion", "flow", "miniature", "miniature_flow"] = "stable_diffusion"

    @model_validator(mode="after")
    def has_beta_as_its_objective_has(self) -> Recipe:
        section = OBJECTIVE_SECTIONS.get(self.objective)
        if section is None:
            raise ValueError(f"objective {self.objective} must be one of {', '.join(OBJECTIVE_SECTIONS)}")
        has_beta = "beta" in section.model_fields
        if has_beta != (self.beta is not None):
            raise ValueError(f"beta {self.beta}: objective {self.objective} {'needs one' if has_beta else 'has none'}")
        return self

    @property
    def group(self) -> str:
        """Its objective, or the group of objectives that share recipes."""
        return OBJECTIVE_SECTIONS[self.objective].recipe_group or self.objective


def read_recipes(content: Any) -> tuple[Recipe, ...]:
    """Return the recipes of a file's content. Raises pydantic.ValidationError, which names the row and the field."""
    return TypeAdapter(tuple[Recipe, ...]).validate_python(content)


@cache
def known_recipes() -> tuple[Recipe, ...]:
    """Return the recipes in this package."""
    return read_recipes(read_yaml(RECIPES_FILE, list))


def recipes_like(config: RunConfig) -> list[Recipe]:
    """Return the known recipes that fit a run: those of its objective or group and kind of model, full or LoRA."""
    group = config.objective.recipe_group or config.objective.type
    trained = "full" if config.adapter.type == "none" else "lora"
    is_flow = LIMITS[config.model.family].is_flow
    if config.model.pretrained.startswith(f"{ASSET_PREFIX}assets/miniature"):
        model = "miniature_flow" if is_flow else "miniature"
    else:
        model = "flow" if is_flow else "stable_diffusion"
    return [
        recipe for recipe in known_recipes() if (recipe.group, recipe.trained, recipe.model) == (group, trained, model)
    ]


def far_from_recipes(config: RunConfig) -> list[str]:
    """Return a line for each of beta, learning rate and pairs per step that is more than 10x from every known recipe.

    There is no line for a value that no recipe has.
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
    """Return the recipes' values of a setting, each with its source."""
    return {getattr(recipe, name): recipe.source for recipe in recipes if getattr(recipe, name) is not None}
