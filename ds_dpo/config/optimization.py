"""The run configuration's sections on what is trained and how: adapter, optimizer and learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from ds_dpo.config.base import Section, free_field, identity_field

# Which fields beside the rate, the decay and the clipping an optimizer heeds.
OPTIMIZER_FIELDS = {
    "adamw": ("adam_beta1", "adam_beta2", "epsilon"),
    "adamw_8bit": ("adam_beta1", "adam_beta2", "epsilon"),
    "lion": ("lion_beta1", "lion_beta2"),
    "lion_8bit": ("lion_beta1", "lion_beta2"),
}
# Which fields a schedule heeds.
SCHEDULE_FIELDS = {
    "constant": (),
    "constant_with_warmup": ("warmup_steps",),
    "linear": ("warmup_steps", "decay_steps"),
    "cosine": ("warmup_steps", "decay_steps"),
    "cosine_with_restarts": ("warmup_steps", "decay_steps", "num_cycles"),
    "polynomial": ("warmup_steps", "decay_steps", "power", "end_rate"),
    "piecewise_constant": ("step_rules",),
}
DECAYING_SCHEDULES = tuple(name for name, fields in SCHEDULE_FIELDS.items() if "decay_steps" in fields)
NO_ADAFACTOR = (
    "it keeps the row and column means of each weight's squared gradients, and under ZeRO, which every run has, an "
    "optimizer sees flat parts of weights, without rows; adamw_8bit or lion_8bit save memory too"
)
ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


class AdapterConfig(Section):
    """Low-rank layers beside frozen ones, by peft; the frozen ones are the model as its file holds it."""

    type: Literal["none", "lora", "rslora", "dora"] = identity_field(
        "none: the UNet itself is trained; rslora: scale alpha / sqrt(rank); dora: lora with trained row norms",
        default="none",
    )
    rank: int = identity_field("columns of each low-rank factor", default=16, ge=1)
    alpha: float | None = identity_field("the layers' output is scaled by alpha / rank; none: rank", default=None, gt=0)
    targets: list[str] = identity_field(
        "names, or ends of names, of the linear and convolution layers that get one",
        default=ATTENTION_PROJECTIONS,
        min_length=1,
    )
    dropout: float = identity_field("share of inputs that a low-rank layer does not see", default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def without_an_adapter_nothing_is_set(self) -> AdapterConfig:
        if self.type == "none":
            for name, info in type(self).model_fields.items():
                value = getattr(self, name)
                if name != "type" and value != info.default:
                    raise ValueError(
                        f"adapter.{name} {value} has no effect with adapter.type none; take lora, rslora or dora"
                    )
        return self


class OptimizerConfig(Section):
    """AdamW by torch, fused on GPUs; Lion and the 8-bit ones by bitsandbytes."""

    type: Literal["adamw", "adamw_8bit", "lion", "lion_8bit"] = identity_field(
        "the optimizer; lion wants a third to a tenth of adamw's rate", default="adamw"
    )
    learning_rate: float = identity_field("peak rate; never scaled by batch or ranks", gt=0)
    adam_beta1: float = identity_field("AdamW: decay of the mean of gradients", default=0.9, ge=0, lt=1)
    adam_beta2: float = identity_field("AdamW: decay of the mean of squared gradients", default=0.999, ge=0, lt=1)
    lion_beta1: float = identity_field("Lion: share of the mean in an update's sign", default=0.9, ge=0, lt=1)
    lion_beta2: float = identity_field("Lion: decay of the mean of gradients", default=0.99, ge=0, lt=1)
    weight_decay: float = identity_field("decoupled decay; times the rate, each step", default=0.01, ge=0)
    epsilon: float = identity_field("AdamW: added to the root of the second moment", default=1e-8, gt=0)
    max_grad_norm: float | None = identity_field("clip the gradient's 2-norm to this; none: never", default=1.0, gt=0)

    @field_validator("type", mode="before")
    @classmethod
    def adafactor_needs_whole_weights(cls, value: Any) -> Any:
        if value == "adafactor":
            raise ValueError(NO_ADAFACTOR)
        return value

    @model_validator(mode="after")
    def an_optimizer_heeds_what_is_set(self) -> OptimizerConfig:
        _require_heeded(self, "optimizer.type", self.type, OPTIMIZER_FIELDS)
        return self


class ScheduleConfig(Section):
    """Learning rate over optimizer steps, by diffusers.optimization and its names."""

    name: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = identity_field("shape after warm-up; linear and cosine fall to 0", default="constant_with_warmup")
    warmup_steps: int = identity_field("optimizer steps over which the rate rises from 0", default=0, ge=0)
    decay_steps: int | None = identity_field(
        "optimizer step at which a decaying schedule ends; none: max_train_steps", default=None, ge=1
    )
    num_cycles: int = identity_field("cosine_with_restarts: falls from the peak to 0", default=1, ge=1)
    power: float = identity_field("polynomial: 1 falls in a line, more falls faster at first", default=1.0, gt=0)
    end_rate: float = identity_field("polynomial: the rate at its end", default=1e-7, ge=0)
    step_rules: str | None = identity_field(
        "piecewise_constant: FACTOR:STEP,...,FACTOR; 1:10,0.1:20,0.01 is the peak rate up to step 10, a tenth of it up "
        "to step 20, and then a hundredth",
        default=None,
    )

    @field_validator("step_rules")
    @classmethod
    def rules_are_factors_up_to_rising_steps(cls, rules: str | None) -> str | None:
        if rules is not None and not _are_step_rules(rules):
            raise ValueError("factors up to rising steps and one for the rest, such as 1:10,0.1:20,0.01, would fit")
        return rules

    @model_validator(mode="after")
    def a_schedule_heeds_what_is_set(self) -> ScheduleConfig:
        _require_heeded(self, "schedule.name", self.name, SCHEDULE_FIELDS)
        if self.name == "piecewise_constant" and self.step_rules is None:
            raise ValueError("schedule.name piecewise_constant needs schedule.step_rules, such as 1:10,0.1:20,0.01")
        return self


class NonFiniteConfig(Section):
    """What is done about steps whose loss or gradient is not finite; each is left out, whatever stands here."""

    max_steps_in_a_row: int | None = free_field(
        "so many in a row end the run, saved; with fp16 those count that a lower loss scale cannot help; none: never",
        default=10,
        ge=1,
    )


def _require_heeded(section: Section, field: str, choice: str, heeded: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a field that the choice ignores and that is not at its default. heeded: by choice."""
    fields = type(section).model_fields
    for name in dict.fromkeys(itertools.chain.from_iterable(heeded.values())):
        value, default = getattr(section, name), fields[name].default
        if name in heeded[choice] or value == default:
            continue
        fitting = [other for other, names in heeded.items() if name in names]
        neutral = "none" if default is None else f"{default:g}"
        raise ValueError(f"{field} {choice} ignores {name} {value}; take {' or '.join(fitting)}, or {name} {neutral}")


def _are_step_rules(rules: str) -> bool:
    *spans, last = rules.split(",")
    try:
        factors = [float(last), *(float(span.split(":")[0]) for span in spans)]
        steps = [0, *(int(span.split(":")[1]) for span in spans)]
    except (ValueError, IndexError):
        return False
    is_rising = all(earlier < later for earlier, later in itertools.pairwise(steps))
    return is_rising and all(0 <= factor < float("inf") for factor in factors)
