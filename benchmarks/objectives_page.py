"""What the runs of objectives.py reached, as the tables of a page: figures in, text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from objectives import CONTROL, MARGIN, PAIRS_PER_STEP, SEARCH_SEED, SEEDS, SHARES, STEPS
from objectives_settings import Miniature, Setting

from ds_dpo.evaluation.statistics.bootstrap import Interval, bootstrap_interval

KEPT_SECTION = "## What it shows"
Figures = dict[str, Any]


def write_page(folder: Path, miniature: Miniature) -> str:
    """Write the page from all runs in a folder, its last section as it stands; returns the new part."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    (base,) = (run for run in runs if run["run"]["setting"] is None)
    trained = [run for run in runs if run["run"]["setting"] is not None]
    page = miniature.page
    kept = page.read_text(encoding="utf-8").partition(KEPT_SECTION)[2] if page.exists() else "\n"
    parts = (
        introduction(base, runs, miniature),
        reported(base, trained, miniature),
        searched(base, trained, miniature),
    )
    text = "\n".join(line for part in parts for line in part)
    page.write_text(f"{text}\n{KEPT_SECTION}{kept}", encoding="utf-8")
    return text


def introduction(base: Figures, runs: Sequence[Figures], miniature: Miniature) -> list[str]:
    commits = sorted({run["commit"] for run in runs})
    prompts = len(set(base["prompts"]))
    images = len(base["prompts"]) // prompts
    return [
        f"# {miniature.title}",
        "",
        f"`benchmarks/objectives.py` made this page on {datetime.now(UTC):%Y-%m-%d} (commits {', '.join(commits)}).",
        f"Every objective trains the shipped base for {STEPS} steps of {PAIRS_PER_STEP} pairs in fp32, all weights,",
        f"with 20 steps of warm-up and linear decay. The evaluation draws {prompts} prompts that no pair has, {images}",
        f"images each, from the same noise for all models, in 20 {miniature.sampler} steps without guidance. A reward",
        "is at most 2.",
        "",
    ]


# ---- the reported seeds ----


def of_seeds(trained: Sequence[Figures], setting: Setting) -> list[Figures]:
    """Return a setting's runs on the reported seeds, in their order."""
    found = {run["run"]["seed"]: run for run in trained if run["run"]["setting"] == setting_as_read(setting)}
    return [found[seed] for seed in SEEDS if seed in found]


def setting_as_read(setting: Setting) -> dict[str, Any]:
    return json.loads(json.dumps(vars(setting)))


def reported(base: Figures, trained: Sequence[Figures], miniature: Miniature) -> list[str]:
    titles = ["objective", "setting", "seeds", "reward", "gain on base", f"better by > {MARGIN}"]
    titles += [f"worse by > {MARGIN}", "gain on sft", *(name.replace("_", " ") for name in SHARES)]
    titles += ["diversity", "chosen error"]
    chosen = {name: of_seeds(trained, settings[0]) for name, settings in miniature.settings.items()}
    chosen = {name: runs for name, runs in chosen.items() if runs}
    lines = [f"## Over training seeds {', '.join(map(str, SEEDS))}", "", row(titles), "|---" * len(titles) + "|"]
    shares = [percent(fmean(base[name])) for name in SHARES]
    own = [f"{fmean(base['reward']):.3f}", "", "", "", "", *shares, f"{base['diversity']:.3f}", ""]
    lines.append(row(["base", "", "", *own]))
    for name, runs in chosen.items():
        lines.append(
            row([name, str(miniature.settings[name][0]), str(len(runs)), *cells(base, runs, chosen.get(CONTROL, []))])
        )
    return [*lines, "", *legend(), "", *verdicts(base, chosen), ""]


def cells(base: Figures, runs: Sequence[Figures], control: Sequence[Figures]) -> list[str]:
    if any(run["failed"] for run in runs):
        return ["not finite"]
    gain = pooled(runs, [base] * len(runs), lambda difference: difference)
    better = pooled(runs, [base] * len(runs), lambda difference: difference > MARGIN)
    worse = pooled(runs, [base] * len(runs), lambda difference: difference < -MARGIN)
    is_control = [run["run"] for run in runs] == [run["run"] for run in control]
    beside = "-"
    if len(control) == len(runs) and not is_control:
        beside = interval(pooled(runs, control, lambda difference: difference), "{:+.3f}")
    movement = [run["movement"].get("chosen_difference") for run in runs]
    return [
        f"{fmean(value for run in runs for value in run['reward']):.3f}",
        f"{interval(gain, '{:+.3f}')}; {', '.join(f'{own:+.2f}' for own in gains(base, runs))}",
        interval(better, "{:.1%}"),
        interval(worse, "{:.1%}"),
        beside,
        *(percent(fmean(value for run in runs for value in run[name])) for name in SHARES),
        f"{fmean(run['diversity'] for run in runs):.3f}",
        "-" if None in movement else f"{fmean(movement):+.4f}",
    ]


def legend() -> list[str]:
    return [
        "Brackets hold 95 % intervals from 10,000 resamples of whole prompts, each with its images of all seeds. After",
        "the gain on the base comes the gain of each seed. Better and worse are the shares of images whose reward is",
        f"more than {MARGIN} above or below that of the base from the same noise. Gain on sft compares with the run of",
        "the same seed. Diversity is the root mean square between images of one prompt. Chosen error is the policy's",
        "error on chosen images minus the reference's, the mean of the last 50 steps.",
    ]


def verdicts(base: Figures, chosen: dict[str, list[Figures]]) -> list[str]:
    """Say of each objective whether it improves the base, and the control."""
    groups: dict[str, list[str]] = {}
    for name, runs in chosen.items():
        groups.setdefault(verdict(base, runs, [] if name == CONTROL else chosen.get(CONTROL, [])), []).append(name)
    return [f"- {text}: {', '.join(names)}." for text, names in sorted(groups.items())]


def verdict(base: Figures, runs: Sequence[Figures], control: Sequence[Figures]) -> str:
    if any(run["failed"] for run in runs):
        return "Does not train: the model draws no finite images"
    gain = pooled(runs, [base] * len(runs), lambda difference: difference)
    if gain.low <= 0 or min(gains(base, runs)) <= 0:
        return "**Does NOT improve the base** on every seed" if gain.high > 0 else "**Harms the base**"
    if len(control) != len(runs):
        return "Improves the base on every seed"
    beside = pooled(runs, control, lambda difference: difference)
    if beside.low > 0:
        return "Improves the base on every seed, and more than sft does"
    if beside.high < 0:
        return "Improves the base on every seed, but less than sft does"
    return "Improves the base on every seed, but its interval does not show more than sft does"


def pooled(runs: Sequence[Figures], rivals: Sequence[Figures], of: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Return the mean over all runs' images of a function of the difference in reward, resampled by prompt."""
    differences = [np.subtract(own["reward"], rival["reward"]) for own, rival in zip(runs, rivals, strict=True)]
    prompts = [prompt for run in runs for prompt in run["prompts"]]
    return bootstrap_interval(of(np.concatenate(differences)), prompts)


def gains(base: Figures, runs: Sequence[Figures]) -> list[float]:
    return [fmean(run["reward"]) - fmean(base["reward"]) for run in runs]


# ---- the search ----


def searched(base: Figures, trained: Sequence[Figures], miniature: Miniature) -> list[str]:
    """The candidates on the seed that is not reported."""
    lines = [
        f"## The search, on training seed {SEARCH_SEED}",
        "",
        "Steps, pairs and evaluation are the same. The chosen setting is the one with the largest reward or, of those",
        "within 0.02 of it, the one with the fewest images that became worse.",
        "",
        row(["objective", "setting", "reward", "better", "worse", "valid", "background", "chosen"]),
        "|---" * 8 + "|",
    ]
    for name, settings in miniature.settings.items():
        for setting in settings:
            for run in trained:
                if run["run"]["setting"] == setting_as_read(setting) and run["run"]["seed"] == SEARCH_SEED:
                    is_chosen = "yes" if setting is settings[0] else ""
                    lines.append(row([name, str(setting), *search_cells(base, run), is_chosen]))
    return [*lines, ""]


def search_cells(base: Figures, run: Figures) -> list[str]:
    if run["failed"]:
        return ["not finite", "", "", "", ""]
    difference = np.subtract(run["reward"], base["reward"])
    return [
        f"{fmean(run['reward']):.3f}",
        percent((difference > MARGIN).mean()),
        percent((difference < -MARGIN).mean()),
        percent(fmean(run["valid"])),
        percent(fmean(run["background"])),
    ]


def row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def percent(share: float) -> str:
    return f"{share:.1%}"


def interval(found: Interval, form: str) -> str:
    return f"{form} [{form}, {form}]".format(found.mean, found.low, found.high)
