"""Which candidates become pairs, and how many each filter drops; decided from columns, without opening images.

Legend: R rows, C candidates, P pairs that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ds_dpo.config.data import DataConfig
from ds_dpo.data.selection.candidates import Candidates, as_numbers, codes_of, model_numbers
from ds_dpo.data.selection.formats import Columns
from ds_dpo.data.selection.prompt_share import PromptShare
from ds_dpo.errors import DataError

# returns a (C,) mask: true for candidates that are kept
Filter = Callable[[Candidates, "Setting"], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What filters read. table: R rows of the columns named by columns_of_filters. part: None for all prompts."""

    data: DataConfig
    table: pa.Table
    columns: Mapping[str, str]
    grouped: bool
    name: str
    part: PromptShare | None = None

    def column(self, role: str) -> pa.ChunkedArray:
        """Return all R rows of a role's column."""
        return self.table.column(self.columns[role])

    def numbers(self, role: str) -> NDArray[np.float64]:
        """Return a role's numbers, (R,), NaN for null."""
        return as_numbers(self.column(role), self.columns[role], self.name)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The pairs that are kept. target, weight: (P,) float32. counts: by name, as in PairSource."""

    candidates: Candidates
    target: NDArray[np.float32]
    weight: NDArray[np.float32]
    counts: Mapping[str, int]


def columns_of_filters(columns: Columns, data: DataConfig) -> list[str]:
    """Return the columns that choose_pairs needs."""
    roles = ["prompt"]
    if data.has_label == "require":
        roles.append("has_label")
    if data.models:
        roles += ["models", "model_0", "model_1"]
    if data.labels is None and (data.min_confidence is not None or data.confidence != "ignore"):
        roles.append("confidence")
    return [columns.of_role[role] for role in roles if role in columns.of_role]


def choose_pairs(candidates: Candidates, setting: Setting, *, num_unlabelled: int | None = None) -> Chosen:
    """Return the candidates that pass all filters, and how many each filter drops.

    num_unlabelled: number of pairs that data.labels has no label for and that are left out; None without data.labels.
    Raises DataError if data.ties is error and there are ties, or if a confidence is out of range for its use.
    """
    num_rows, data = len(setting.table), setting.data
    num_ties = int(candidates.is_tie.sum())
    if num_ties and data.ties == "error":
        raise DataError(
            f"{setting.name}: {num_ties} of {len(candidates)} {'rows' if len(candidates) == num_rows else 'pairs'} are "
            f"ties, the first is row {candidates.row[np.argmax(candidates.is_tie)]}; data.ties is error, and drop "
            "would leave them out"
        )
    counts = {"rows": num_rows, "candidates": len(candidates), "ties": num_ties}
    if num_unlabelled is not None:
        counts["candidates"] += num_unlabelled
        counts["dropped_unlabelled"] = num_unlabelled
    for name, is_kept in FILTERS.items():
        kept = is_kept(candidates, setting)
        counts[name] = len(kept) - int(kept.sum())
        candidates = candidates.keep(kept)
    if setting.part is not None:
        kept = setting.part.rows(setting.column("prompt"))[candidates.row]
        counts[setting.part.count_name] = len(kept) - int(kept.sum())
        candidates = candidates.keep(kept)
    counts["pairs"] = len(candidates)
    counts["prompts"] = _num_prompts(candidates, setting)
    if counts["candidates"] == counts["rows"]:
        del counts["candidates"]
    target, weight = _targets_and_weights(candidates, setting)
    return Chosen(candidates=candidates, target=target, weight=weight, counts=counts)


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts as one line, without filters that dropped nothing."""
    parts = [f"{counts['rows']} rows"]
    if "candidates" in counts:
        parts.append(f"{counts['candidates']} pairs in them")
    kept_ties = counts["ties"] - counts["dropped_ties"]
    reasons = (
        (counts.get("dropped_unlabelled", 0), "left out because data.labels has no label for them"),
        (counts["dropped_label"], "left out without a label"),
        (counts["dropped_ties"], "ties left out"),
        (kept_ties if not counts["dropped_ties"] else 0, "ties trained towards equality"),
        (counts["dropped_confidence"], "left out for low confidence"),
        (counts["dropped_models"], "left out for other models"),
        (counts["dropped_prompt_limit"], "left out as further pairs of a prompt"),
        (counts.get("dropped_held_out", 0), "held out"),
        (counts.get("dropped_trained_on", 0), "trained on"),
    )
    parts += [f"{number} {reason}" for number, reason in reasons if number]
    return ", ".join([*parts, f"{counts['pairs']} pairs of {counts['prompts']} prompts"])


def _has_label(candidates: Candidates, setting: Setting) -> NDArray[np.bool_]:
    if setting.data.has_label != "require":
        return np.ones(len(candidates), bool)
    return (setting.numbers("has_label") == 1)[candidates.row]


def _is_decided(candidates: Candidates, setting: Setting) -> NDArray[np.bool_]:
    return ~candidates.is_tie if setting.data.ties == "drop" else np.ones(len(candidates), bool)


def _is_confident(candidates: Candidates, setting: Setting) -> NDArray[np.bool_]:
    if setting.data.min_confidence is None:
        return np.ones(len(candidates), bool)
    confidence = _confidence(candidates, setting)
    return np.isnan(confidence) | (confidence >= setting.data.min_confidence)


def _confidence(candidates: Candidates, setting: Setting) -> NDArray[np.float64]:
    """Return each candidate's confidence, (C,), NaN if unknown: that of its label, else that of its row."""
    if candidates.confidence is not None:
        return candidates.confidence
    return setting.numbers("confidence")[candidates.row]


def _is_of_models(candidates: Candidates, setting: Setting) -> NDArray[np.bool_]:
    """Keep pairs whose images both come from a model with one of data.models in its name, ignoring case."""
    if not setting.data.models:
        return np.ones(len(candidates), bool)
    names, first, second = model_numbers(
        setting.table, setting.columns, candidates, grouped=setting.grouped, name=setting.name
    )
    encoded = names.dictionary_encode() if not isinstance(names, pa.DictionaryArray) else names
    known = np.array(
        [
            any(part.lower() in str(each or "").lower() for part in setting.data.models)
            for each in encoded.dictionary.to_pylist()
        ]
        + [False]
    )
    fits = known[np.asarray(pc.fill_null(encoded.indices, len(known) - 1)).astype(np.int64)]
    return fits[first] & fits[second]


def _is_within_prompt_limit(candidates: Candidates, setting: Setting) -> NDArray[np.bool_]:
    limit = setting.data.max_pairs_per_prompt
    if limit is None:
        return np.ones(len(candidates), bool)
    prompts = codes_of(setting.column("prompt"))[candidates.row]
    order = np.argsort(prompts, kind="stable")
    sorted_prompts = prompts[order]
    starts = np.searchsorted(sorted_prompts, sorted_prompts, side="left")
    kept = np.empty(len(candidates), bool)
    kept[order] = np.arange(len(candidates)) - starts < limit
    return kept


# in the order of application; a pair is counted for the first filter that drops it
FILTERS: Mapping[str, Filter] = {
    "dropped_label": _has_label,
    "dropped_ties": _is_decided,
    "dropped_confidence": _is_confident,
    "dropped_models": _is_of_models,
    "dropped_prompt_limit": _is_within_prompt_limit,
}


def _num_prompts(candidates: Candidates, setting: Setting) -> int:
    codes = codes_of(setting.column("prompt"))
    is_text = np.asarray(setting.column("prompt").is_valid())
    rows = np.unique(candidates.row)
    return len(np.unique(codes[rows[is_text[rows]]]))


def _targets_and_weights(candidates: Candidates, setting: Setting) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    target = np.where(candidates.is_tie, 0.5, 1.0).astype(np.float32)
    weight = np.ones(len(candidates), dtype=np.float32)
    use = setting.data.confidence
    if use == "ignore":
        return target, weight
    confidence = _confidence(candidates, setting)
    highest = 1.0 if use == "target" else np.finfo(np.float32).max
    unfit = np.flatnonzero((confidence < 0) | (confidence > highest))
    if len(unfit):
        raise DataError(
            f"{setting.name}: {setting.columns['confidence']} is {confidence[unfit[0]]:g} in row "
            f"{candidates.row[unfit[0]]}, and cannot be a {use} in {len(unfit)} pairs; "
            f"{'0 to 1' if use == 'target' else '0 or more'} would fit"
        )
    known = ~np.isnan(confidence)
    if use == "target":
        target[known & ~candidates.is_tie] = confidence[known & ~candidates.is_tie]
    else:
        weight[known] = confidence[known]
    return target, weight
