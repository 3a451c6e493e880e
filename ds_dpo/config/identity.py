"""The identity of a run: the fields that define it, and the differences between two runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.names import RENAMED
from ds_dpo.config.optimization import DECAYING_SCHEDULES
from ds_dpo.config.run import RunConfig

NOT_SET = "(not set)"
SHOWN_CHARACTERS = 200
# The identity fields of the first versions, whose checkpoints hold nothing but a hash over all of them. A field that is
# not named here came later: those versions behaved as its default says.
_FIRST = {
    "": "precision seed terms.sft_weight terms.anchor_weight",
    "model": "pretrained revision variant family prediction_type denoiser_init vae vae_dtype train freeze",
    "adapter": "type rank alpha targets dropout",
    "data": "dataset name revision split format columns ties confidence min_confidence models has_label "
    "max_pairs_per_prompt max_rows resolution aspect_buckets bucket_step max_aspect crop flip size_conditioning "
    "prompt_dropout",
    "diffusion": "timestep_sampling min_timestep max_timestep logit_mean logit_std zero_terminal_snr noise_offset "
    "input_perturbation error_weighting snr_gamma",
    "objective": "type beta target_gradient_factor beta_min beta_max gap_decay label_smoothing alpha mu utility "
    "desirable_weight undesirable_weight ratio_weight snr_value score_scale shift",
    "reference": "refresh_every_steps",
    "batch": "pairs_per_step",
    "optimizer": "type learning_rate adam_beta1 adam_beta2 lion_beta1 lion_beta2 weight_decay epsilon max_grad_norm",
    "ema": "decay",
    "schedule": "name warmup_steps decay_steps num_cycles power end_rate step_rules",
}
FIRST_FIELDS = frozenset(
    f"{section}.{name}" if section else name for section, names in _FIRST.items() for name in names.split()
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """An identity field with different values."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.old)} -> {_shown(self.new)}"


def _shown(value: object) -> str:
    """Return a value for a message, cut, because it may come from a file."""
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def identity(config: RunConfig, precision: str) -> dict[str, object]:
    """Return the values that define this run, by dotted name, `precision` (fp32, bf16, fp16) included.

    schedule.decay_steps is the resolved number if the schedule decays. So a longer run with a constant schedule is the
    same run, and one with a linear schedule is another run unless decay_steps is set.
    """
    nested = config.model_dump(mode="json")
    flat: dict[str, object] = {}
    for path, spec in FIELDS.items():
        section, _, name = path.rpartition(".")
        holder = nested[section] if section else nested
        if spec.is_identity and name in holder:
            flat[path] = holder[name]
    if config.schedule.name in DECAYING_SCHEDULES:
        flat["schedule.decay_steps"] = config.schedule.decay_steps or config.max_train_steps
    flat["precision"] = precision
    return flat


def fingerprint(fields: Mapping[str, object]) -> str:
    """Return the SHA-256 of an identity, 64 hex digits, by which a checkpoint belongs to its run.

    A renamed field counts under its first name, so that a run goes on from the checkpoints of an earlier version.
    """
    first_names = {now: first for first, now in RENAMED.items()}
    named = {first_names.get(name, name): value for name, value in fields.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def fingerprints(fields: Mapping[str, object]) -> set[str]:
    """Return the fingerprints that this and earlier versions give to the same run."""
    return {
        fingerprint(known)
        for written in _as_written_before(fields)
        for known in (
            written,
            {name: value for name, value in written.items() if name in FIRST_FIELDS or value != _default(name)},
        )
    }


def _as_written_before(fields: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Yield the fields, and all ways in which earlier versions kept paths of the home folder: each whole, or with ~."""
    home = os.path.expanduser("~/")
    ways = [
        (value, f"~/{value.removeprefix(home)}") if isinstance(value, str) and value.startswith(home) else (value,)
        for value in fields.values()
    ]
    for values in itertools.product(*ways):
        yield dict(zip(fields, values, strict=True))


def under_present_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields that any version saved, each under the name that it has now, and paths without ~."""
    return {
        RENAMED.get(name, name): os.path.expanduser(value) if isinstance(value, str) else value
        for name, value in fields.items()
    }


def compare_identity(old: Mapping[str, object], new: Mapping[str, object]) -> list[Change]:
    """Return the fields in which two identities differ, in the order of the newer one."""
    names = [*new, *(name for name in old if name not in new)]
    return [
        Change(name=name, old=old.get(name, NOT_SET), new=new.get(name, NOT_SET))
        for name in names
        if old.get(name, NOT_SET) != new.get(name, NOT_SET)
    ]


def compare_saved_identity(old: Mapping[str, object], new: Mapping[str, object]) -> list[Change]:
    """Return the differences from an identity that an earlier version may have saved: it lacks the later fields.

    A field that it lacks had the default's effect, unless it belongs to the first version or to another objective.
    """
    later = {name: _default(name) for name in new if name not in FIRST_FIELDS}
    return compare_identity({**later, **under_present_names(old)}, new)


def _default(name: str) -> object:
    return FIELDS[name].default if name in FIELDS else None


def way_to_a_longer_run(changes: Iterable[Change], config: RunConfig) -> str:
    """Return '; ' and how a run goes on for more steps, or '' if its schedule's end did not move with max_train_steps.

    config: of the new start.
    """
    moved = next((change for change in changes if change.name == "schedule.decay_steps"), None)
    if moved is None or config.schedule.decay_steps is not None or config.schedule.name not in DECAYING_SCHEDULES:
        return ""
    return (
        f"; the end of schedule {config.schedule.name} follows max_train_steps {config.max_train_steps}: to train to "
        f"that step with the schedule that the run has, add --schedule.decay_steps {moved.old}"
    )
