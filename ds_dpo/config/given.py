"""Refuse a field that is given for a choice that was not made, such as adapter.rank without adapter.type.

A field with its default's value would pass every check of values, and the run would do something else than its user
thinks: train all weights instead of a low-rank adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.layers import Layer
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.config.optimization import OPTIMIZER_FIELDS, SCHEDULE_FIELDS
from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a field needs to have an effect: one of the choices of another field, or, without choices, any value."""

    field: str
    choices: Collection[str] | None = None

    def is_met_by(self, value: Any) -> bool:
        return value not in (None, False, "off") if self.choices is None else value in self.choices

    def advice(self, value: Any) -> str:
        if self.choices is None:
            example = "true" if FIELDS[self.field].kind is bool else "a value"
            return f"without {self.field}; give {self.field} {example}"
        return f"with {self.field} {value}; take {' or '.join(self.choices)}"


def _needs() -> Iterator[tuple[str, Need]]:
    for name in ("rank", "alpha", "targets", "dropout"):
        yield f"adapter.{name}", Need(field="adapter.type", choices=("lora", "rslora", "dora"))
    for section, chooser, table in (
        ("optimizer", "optimizer.type", OPTIMIZER_FIELDS),
        ("schedule", "schedule.name", SCHEDULE_FIELDS),
    ):
        for name in {name for names in table.values() for name in names}:
            choices = tuple(choice for choice, names in table.items() if name in names)
            yield f"{section}.{name}", Need(field=chooser, choices=choices)
    for name in ("logit_mean", "logit_std"):
        yield f"diffusion.{name}", Need(field="diffusion.timestep_sampling", choices=("logit_normal",))
    yield "diffusion.mode_scale", Need(field="diffusion.timestep_sampling", choices=("mode",))
    yield "diffusion.shift", Need(field="diffusion.timestep_shift", choices=("static",))
    yield "diffusion.snr_gamma", Need(field="diffusion.error_weighting", choices=("min_snr",))
    with_reference = tuple(name for name, kind in OBJECTIVE_SECTIONS.items() if kind.reference_need != "none")
    for name in ("residency", "refresh_every_steps", "ema_decay", "preflight"):
        yield f"reference.{name}", Need(field="objective.type", choices=with_reference)
    yield "reference.cache", Need(field="reference.residency", choices=("cached",))
    for name in ("bucket_step", "max_aspect"):
        yield f"data.{name}", Need(field="data.aspect_buckets")
    for name in ("beta_min", "beta_max", "gap_decay"):
        yield f"objective.{name}", Need(field="objective.target_gradient_factor")
    yield "validation.scorers", Need(field="cadence.sample_every_steps")
    yield "watchdog.rate_factor", Need(field="watchdog.action", choices=("lower_rate", "roll_back"))


NEEDS = dict(_needs())


def refuse_what_has_no_effect(layers: Sequence[Layer], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field that a user gives, whatever its value, if another field makes it meaningless.

    layers: the lowest first. values: of all layers together. Not refused: what switches something off (none, 0, false,
    no entries), what takes back a lower layer's value, what a higher layer switches off, and the whole record that a
    run saves of its configuration.
    """
    for path, need in NEEDS.items():
        place = _last_place(path, layers)
        if place is None or layers[place].is_preset or _is_record(layers[place]):
            continue
        given = layers[place].values[path]
        takes_back = any(layer.values.get(path, given) != given for layer in layers[:place])
        chosen_at = _last_place(need.field, layers)
        if not given or takes_back or (chosen_at is not None and chosen_at > place):
            continue
        choice = values.get(need.field, FIELDS[need.field].default)
        if not need.is_met_by(choice):
            raise ConfigError(f"{path} {_shown(given)} has no effect {need.advice(choice)}, or leave {path} out")


def _last_place(path: str, layers: Sequence[Layer]) -> int | None:
    return next((place for place in reversed(range(len(layers))) if path in layers[place].values), None)


def _is_record(layer: Layer) -> bool:
    """Return whether a layer is the config.yaml of a run, which holds every field; a user gives far fewer."""
    return len(layer.values) > len(FIELDS) / 2


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
