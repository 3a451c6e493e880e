"""Write a part of a checkout's record by calling its code; behaviour.py starts this with that checkout on PYTHONPATH.

    PYTHONPATH=CHECKOUT python benchmarks/behaviour_inside.py trainings | orders | configurations

It writes files to the current folder. It finds a module under its present or its earlier name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from behaviour_runs import MODEL, SHORT, SHORT_RUNS
from launching import spell  # behaviour_runs puts its folder on the path

MOST_RANKS = 16  # of the resolved configurations
# The module of a name now, and before the packages.
PLACES = {
    "PairOrder": ("ds_dpo.data.stream.order", "ds_dpo.data.order"),
    "load_config": ("ds_dpo.config.load", "ds_dpo.config"),
    "config_to_yaml": ("ds_dpo.config.load", "ds_dpo.config"),
    "resolve_deepspeed": ("ds_dpo.engine.settings", "ds_dpo.deepspeed_config"),
    "train": ("ds_dpo",),
    "quiet_libraries": ("ds_dpo.process.quiet", "ds_dpo.quiet"),
}


def found(name: str) -> Any:
    """Return what ds_dpo has under a name, from its module in this checkout."""
    for place in PLACES[name]:
        try:
            return getattr(import_module(place), name)
        except (ImportError, AttributeError):
            pass
    raise SystemExit(f"{name} is in none of {', '.join(PLACES[name])}; add its new place to PLACES")


def write_trainings() -> None:
    found("quiet_libraries")()
    train = import_module("ds_dpo.train")
    for name, options in SHORT_RUNS.items():
        print(f"== {name}", flush=True)
        train.main(spell({**SHORT, "output_dir": f"short/{name}", **options}))
    sys.stdout.flush()
    os._exit(0)  # a normal exit would abort, because of the threads of many discarded engines


def write_orders() -> None:
    """Write the first places of several orders, and the replacements of unreadable pairs, to one JSON file."""
    pair_order = found("PairOrder")
    kept = {}
    for sizes in ([1], [3016], [7, 100, 33], [851293]):
        for seed in (0, 7):
            order = pair_order(sizes, pairs_per_step=16, seed=seed)
            kept[f"{sizes} seed {seed}"] = {
                "places": [order.place(position) for position in range(2000)],
                "far": [order.place(10**9 + position) for position in range(64)],
                "replacements": [order.replacement(position, 1) for position in range(200)],
                "visits": [order.visits_begun(steps) for steps in (0, 1, 5, 100)],
            }
    Path("orders.json").write_text(json.dumps(kept))


def write_configurations() -> None:
    """Write the run configuration and the DeepSpeed settings of each case to one JSON file."""
    import yaml

    load_config, to_yaml, resolve = found("load_config"), found("config_to_yaml"), found("resolve_deepspeed")
    root = Path(import_module("ds_dpo").__file__ or "").parents[1]
    kept = {}
    for name, arguments in configuration_cases(root):
        config = load_config(arguments).config
        ranks = min(MOST_RANKS, config.batch.pairs_per_step // config.batch.micro_batch_pairs)
        settings = resolve(config, world_size=ranks).settings
        kept[name] = {"run": yaml.safe_load(to_yaml(config)), "deepspeed": settings}
    text = json.dumps(kept, indent=1, sort_keys=True, default=str).replace(str(root), "CHECKOUT")
    Path("configurations.json").write_text(text)


def configuration_cases(root: Path) -> Iterator[tuple[str, Sequence[str]]]:
    for preset in sorted((root / "ds_dpo" / "presets").glob("*.yaml")):
        yield preset.stem, ["--config", preset.stem]
    for settings in sorted((root / "ds_configs").glob("*.json")):
        yield f"miniature on {settings.stem}", ["--config", "miniature", "--deepspeed_config", settings.stem]
    yield "old file", ["--config", "old.yaml"]
    yield "old option", ["--config", "miniature", "--model.unet_init", MODEL]
    yield "old option, dashes", ["--config", "miniature", "--model.unet-init", MODEL]
    yield "flat names", ["--config", "miniature", "--lr", "1e-5", "--beta_dpo", "100", "--adam_weight_decay", "0"]
    for name, options in SHORT_RUNS.items():
        yield f"short run {name}", spell({**SHORT, "output_dir": name, **options})


INSIDE = {"trainings": write_trainings, "orders": write_orders, "configurations": write_configurations}


if __name__ == "__main__":
    INSIDE[sys.argv[1]]()
