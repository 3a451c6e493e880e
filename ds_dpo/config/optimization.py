"""The sections on how weights are trained: adapter, optimizer, learning rate, and steps that are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from ds_dpo.config.base import Section, free_field, identity_field

# The fields that an optimizer uses, besides learning rate, weight decay and clipping.
OPTIMIZER_FIELDS = {
    "adamw": ("adam_beta1", "adam_beta2", "epsilon"),
    "adamw_8bit": ("adam_beta1", "adam_beta2", "epsilon"),
    "lion": ("lion_beta1", "lion_beta2"),
    "lion_8bit": ("lion_beta1", "lion_beta2"),
}
# The fields that a schedule uses.
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
    "Adafactor needs the rows and columns of each weight, and under ZeRO, which every run uses, an optimizer sees flat "
    "parts of weights; adamw_8bit and lion_8bit save memory too"
)
ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


class AdapterConfig(Section):
    """Low-rank layers beside frozen ones, by peft. The frozen layers keep the weights of the model's file."""

    type: Literal["none", "lora", "rslora", "dora"] = identity_field(
        "Low-rank adapter. none: the denoiser itself is trained. lora: scale alpha / rank. rslora: scale alpha / "
        "sqrt(rank). dora: LoRA with trained row norms.",
        default="none",
    )
    rank: int = identity_field("Rank of each low-rank layer.", default=16, ge=1)
    alpha: float | None = identity_field(
        "Numerator of the low-rank layers' scale, alpha / rank (the rank if unset).", default=None, gt=0
    )
    targets: list[str] = identity_field(
        "Names, or ends of names, of the linear and convolution layers that get a low-rank layer; attention, "
        "attention+mlp and all mean every such layer of the attention, of attention and feed-forward, of the model.",
        default=ATTENTION_PROJECTIONS,
        min_length=1,
    )
    dropout: float = identity_field(
        "Probability with which an input of a low-rank layer is set to 0.", default=0.0, ge=0, lt=1
    )

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
    """AdamW by torch, fused on GPUs; Lion and the 8-bit optimizers by bitsandbytes."""

    type: Literal["adamw", "adamw_8bit", "lion", "lion_8bit"] = identity_field(
        "The optimizer. Lion needs a third to a tenth of AdamW's learning rate.", default="adamw"
    )
    learning_rate: float = identity_field(
        "Peak learning rate. It is never scaled by the batch size or the number of ranks.", gt=0
    )
    adam_beta1: float = identity_field("AdamW: decay of the running mean of gradients.", default=0.9, ge=0, lt=1)
    adam_beta2: float = identity_field(
        "AdamW: decay of the running mean of squared gradients.", default=0.999, ge=0, lt=1
    )
    lion_beta1: float = identity_field(
        "Lion: weight of the running mean, against the new gradient, in the sign of an update.",
        default=0.9,
        ge=0,
        lt=1,
    )
    lion_beta2: float = identity_field("Lion: decay of the running mean of gradients.", default=0.99, ge=0, lt=1)
    weight_decay: float = identity_field(
        "Decoupled weight decay: each step multiplies the weights by 1 - learning rate x this.", default=0.01, ge=0
    )
    epsilon: float = identity_field("AdamW: added to the root of the second moment.", default=1e-8, gt=0)
    max_grad_norm: float | None = identity_field(
        "Clip the gradient's 2-norm to this value (off if unset).", default=1.0, gt=0
    )

    @field_validator("type", mode="before")
    @classmethod
    def adafactor_needs_whole_weights(cls, value: Any) -> Any:
        if value == "adafactor":
            raise ValueError(NO_ADAFACTOR)
        return value

    @model_validator(mode="after")
    def an_optimizer_uses_what_is_set(self) -> OptimizerConfig:
        _require_used(self, "optimizer.type", self.type, OPTIMIZER_FIELDS)
        return self


class ScheduleConfig(Section):
    """The learning rate over optimizer steps, by diffusers.optimization, whose names are used."""

    name: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = identity_field(
        "Shape of the learning rate after warm-up; linear and cosine fall to 0.", default="constant_with_warmup"
    )
    warmup_steps: int = identity_field(
        "The learning rate rises from 0 to its peak in the first N optimizer steps.", default=0, ge=0
    )
    decay_steps: int | None = identity_field(
        "Optimizer step at which a decaying schedule ends (max_train_steps if unset).", default=None, ge=1
    )
    num_cycles: int = identity_field(
        "Number of times that cosine_with_restarts falls from the peak to 0.", default=1, ge=1
    )
    power: float = identity_field(
        "Exponent of the polynomial decay: 1 is a straight line, a larger one falls faster at first.",
        default=1.0,
        gt=0,
    )
    end_rate: float = identity_field("Learning rate at the end of the polynomial decay.", default=1e-7, ge=0)
    step_rules: str | None = identity_field(
        "Rules, for piecewise_constant only: FACTOR:STEP,...,FACTOR. For example, 1:10,0.1:20,0.01 is the peak rate "
        "up to step 10, a tenth of it up to step 20, then a hundredth of it.",
        default=None,
    )

    @field_validator("step_rules")
    @classmethod
    def rules_are_factors_up_to_rising_steps(cls, rules: str | None) -> str | None:
        if rules is not None and not _are_step_rules(rules):
            raise ValueError("must be FACTOR:STEP,...,FACTOR with rising steps, such as 1:10,0.1:20,0.01")
        return rules

    @model_validator(mode="after")
    def a_schedule_uses_what_is_set(self) -> ScheduleConfig:
        _require_used(self, "schedule.name", self.name, SCHEDULE_FIELDS)
        if self.name == "piecewise_constant" and self.step_rules is None:
            raise ValueError("schedule.name piecewise_constant needs schedule.step_rules, such as 1:10,0.1:20,0.01")
        return self


class NonFiniteConfig(Section):
    """When steps whose loss or gradient is not finite end the run. The update of each such step is always skipped."""

    max_steps_in_a_row: int | None = free_field(
        "Save and end the run after N steps in a row whose loss or gradient is not finite (never if unset). With fp16, "
        "overflows that a lower loss scale can cure do not count.",
        default=10,
        ge=1,
    )


def _require_used(section: Section, field: str, choice: str, used: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a field that the choice ignores and whose value is not the default.

    used: the fields that each choice uses.
    """
    fields = type(section).model_fields
    for name in dict.fromkeys(itertools.chain.from_iterable(used.values())):
        value, default = getattr(section, name), fields[name].default
        if name in used[choice] or value == default:
            continue
        fitting = [other for other, names in used.items() if name in names]
        neutral = "none" if default is None else f"{default:g}"
        raise ValueError(
            f"{field} {choice} ignores {name} {value}; take {' or '.join(fitting)}, or set {name} to {neutral}"
        )


def _are_step_rules(rules: str) -> bool:
    *spans, last = rules.split(",")
    try:
        factors = [float(last), *(float(span.split(":")[0]) for span in spans)]
        steps = [0, *(int(span.split(":")[1]) for span in spans)]
    except (ValueError, IndexError):
        return False
    is_rising = all(earlier < later for earlier, later in itertools.pairwise(steps))
    return is_rising and all(0 <= factor < float("inf") for factor in factors)
