"""The report on labels as text: what a person reads at the end of scripts/relabel.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def report_text(report: Mapping[str, Any]) -> str:
    """Return tables of agreement with human labels, by scorer and by decile of margin, and of calibration."""
    lines = [
        f"{report['labels']:,} labels of {report['pairs']:,} pairs, {report['ties']:,} of them ties",
        *_left_out(report),
        *_agreement(report),
        *_between_scorers(report),
        *_calibration(report),
    ]
    return "\n".join(lines)


def _left_out(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if report["unreadable_pairs"]:
        lines.append(f"{report['unreadable_pairs']:,} pairs cannot be read, so they have no label")
    for name, number in report["unscored_images"].items():
        if number:
            lines.append(f"{name} gave no score to {number:,} distinct images; their pairs have no label")
    return lines


def _agreement(report: Mapping[str, Any]) -> list[str]:
    if not report["human_labels"]:
        return ["no pair has a human label, so there is no agreement to report"]
    lines = ["", "agreement with human labels", f"{'scorer':<16}{'pairs':>10}{'accuracy':>10}{'kappa':>8}"]
    for name, found in report["agreement_with_human_labels"].items():
        lines.append(f"{name:<16}{found['pairs']:>10,}{_share(found['accuracy']):>10}{_number(found['kappa']):>8}")
    for name, found in report["agreement_with_human_labels"].items():
        lines += ["", f"{name}: accuracy by size of margin, smallest tenth first"]
        lines += [
            f"  {decile['low']:>10.4g} to {decile['high']:<10.4g}{decile['pairs']:>8,} pairs"
            f"{_share(decile['accuracy']):>9}"
            for decile in found["deciles"]
        ]
    return lines


def _between_scorers(report: Mapping[str, Any]) -> list[str]:
    if not report["agreement_of_scorers"]:
        return []
    lines = ["", f"all scorers agree on {_share(report['unanimous_share'])} of the pairs"]
    names = list(report["agreement_of_scorers"])
    lines += [
        f"  {name} and {other}: {_share(report['agreement_of_scorers'][name][other])}"
        for place, name in enumerate(names)
        for other in names[place + 1 :]
    ]
    return lines


def _calibration(report: Mapping[str, Any]) -> list[str]:
    if not report["calibration"]:
        return []
    lines = ["", "calibration, fitted on half of the prompts and measured on the other half"]
    for name, found in report["calibration"].items():
        fitted, held_out = found["calibration"], found["held_out"]
        offset = f" + {fitted['offset']:.4g}" if fitted["offset"] else ""
        lines.append(
            f"  {name}: probability = sigmoid({fitted['slope']:.4g} x margin{offset}), fitted on all pairs; log loss "
            f"{held_out['log_loss']:.3f} (a coin: 0.693), calibration error {held_out['error']:.3f} on "
            f"{held_out['pairs']:,} pairs"
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
