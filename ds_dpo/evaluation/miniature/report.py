"""Score the miniature's images: rewards, side effects, and comparisons of models on the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ds_dpo.config.objectives import SftConfig
from ds_dpo.evaluation.statistics.bootstrap import bootstrap_interval
from ds_dpo.evaluation.statistics.win_rate import win_rate
from ds_dpo.miniature.reward import MAX_REWARD, Measurement, measure

BASE, SFT, TUNED = "base", SftConfig.name(), "tuned"
COMPARISONS = ((TUNED, BASE), (SFT, BASE), (TUNED, SFT))
SHARES = ("valid", "background", "shape", "colour_right")  # of images
MEANS = ("vividness", "offset")
MARGIN = 0.1


@dataclass(frozen=True)
class Judged:
    """A model's images (N, 3, 32, 32) with 8-bit values, the prompt of each, and their measurements."""

    images: Tensor
    prompts: tuple[str, ...]
    found: Measurement


def judge(images: Tensor, prompts: Sequence[str]) -> Judged:
    """Measure images (N, 3, 32, 32) in 0..1 against the prompt of each, after rounding to 8 bits."""
    rounded = (images.clamp(0, 1) * 255).round() / 255
    return Judged(images=rounded, prompts=tuple(prompts), found=measure(rounded, prompts))


def diversity(images: Tensor, prompts: Sequence[str]) -> float | None:
    """Return how much images of a prompt differ: root mean square over pixels, mean over pairs, then over prompts.

    0: all are equal. None: no prompt has two images.
    """
    of_prompts = []
    for prompt in dict.fromkeys(prompts):
        own = [image for image, name in zip(images, prompts, strict=True) if name == prompt]
        distances = [(one - other).square().mean().sqrt() for one, other in combinations(own, 2)]
        if distances:
            of_prompts.append(torch.stack(distances).mean())
    return torch.stack(of_prompts).mean().item() if of_prompts else None


def summarize(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Return figures of base, tuned and, if given, sft, all on the same prompts and seeds.

    Top level: mean rewards (0 to 2), tuned against base, and the tuned model's shares. `models` and `comparisons` have
    the same for all. reward_sft is None without an SFT model.
    """
    base, tuned, sft = judged[BASE], judged[TUNED], judged.get(SFT)
    models = {name: _figures(of_model) for name, of_model in judged.items()}
    comparisons = {
        f"{one}_against_{other}": _compare(judged[one], judged[other])
        for one, other in COMPARISONS
        if one in judged and other in judged
    }
    main = comparisons[f"{TUNED}_against_{BASE}"]
    return {
        "n": len(base.prompts),
        "reward_base": models[BASE]["reward"],
        "reward_tuned": models[TUNED]["reward"],
        "reward_sft": None if sft is None else models[SFT]["reward"],
        "reward_max": MAX_REWARD,
        "win_rate": main["win_rate"],
        "win_rate_low": main["win_rate_low"],
        "win_rate_high": main["win_rate_high"],
        "win_by_margin": main["win_by_margin"],
        "loss_by_margin": main["loss_by_margin"],
        "margin": MARGIN,
        "valid": models[TUNED]["valid"],
        "background": models[TUNED]["background"],
        "identical_to_base": torch.equal(base.images, tuned.images),
        "models": models,
        "comparisons": comparisons,
    }


def _figures(judged: Judged) -> dict[str, Any]:
    found = vars(judged.found)
    reward = bootstrap_interval(judged.found.reward.numpy(), judged.prompts)
    return {
        "reward": reward.mean,
        "reward_low": reward.low,
        "reward_high": reward.high,
        **{name: found[name].double().mean().item() for name in (*SHARES, *MEANS)},
        "diversity": diversity(judged.images, judged.prompts),
    }


def _compare(judged: Judged, rival: Judged) -> dict[str, float]:
    own, other = judged.found.reward.double().numpy(), rival.found.reward.double().numpy()
    wins = asdict(win_rate(own, other, judged.prompts, margin=MARGIN))
    gain = bootstrap_interval(own - other, judged.prompts)
    return {
        "win_rate": wins["rate"],
        "win_rate_low": wins["low"],
        "win_rate_high": wins["high"],
        "win_by_margin": wins["win_by_margin"],
        "loss_by_margin": wins["loss_by_margin"],
        "reward_gain": gain.mean,
        "reward_gain_low": gain.low,
        "reward_gain_high": gain.high,
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary for a terminal: a line per figure, a column per model."""
    names = [name for name in (BASE, SFT, TUNED) if name in summary["models"]]
    models = [summary["models"][name] for name in names]
    compared = summary["comparisons"]
    against_base = [compared.get(f"{name}_against_{BASE}") for name in names]
    against_sft = [compared.get(f"{name}_against_{SFT}") for name in names]
    lines: list[tuple[str, list[str]]] = [
        (f"reward, of {summary['reward_max']:g}", [_with_interval(m, "reward", "{:.3f}") for m in models]),
        ("wins against base", [_with_interval(c, "win_rate", "{:.1%}") for c in against_base]),
        (f"better by > {summary['margin']}", [_value(c, "win_by_margin", "{:.1%}") for c in against_base]),
        (f"worse by > {summary['margin']}", [_value(c, "loss_by_margin", "{:.1%}") for c in against_base]),
        *(
            [(f"wins against {SFT}", [_with_interval(c, "win_rate", "{:.1%}") for c in against_sft])]
            if SFT in names
            else []
        ),
        *((name.replace("_", " "), [_value(m, name, "{:.1%}") for m in models]) for name in SHARES),
        ("diversity", [_value(m, "diversity", "{:.3f}") for m in models]),
    ]
    width = max(len(text) for _, texts in lines for text in texts)
    rows = [("", names), *lines]
    return "\n".join(f"{label:<20}" + "".join(f"  {text:>{width}}" for text in texts) for label, texts in rows)


def _value(figures: Mapping[str, Any] | None, name: str, form: str) -> str:
    return "-" if figures is None or figures[name] is None else form.format(figures[name])


def _with_interval(figures: Mapping[str, Any] | None, name: str, form: str) -> str:
    if figures is None:
        return "-"
    return f"{form} [{form}, {form}]".format(*(figures[key] for key in (name, f"{name}_low", f"{name}_high")))
