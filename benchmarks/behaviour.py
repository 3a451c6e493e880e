"""Record what one checkout of this project computes: curves, exports, caches, orders, configurations, as files.

    python benchmarks/behaviour.py CHECKOUT OUT [--given FOLDER]

same_behaviour.py runs this for two checkouts and compares the folders. Every program of CHECKOUT runs in OUT as a child
process, with CHECKOUT first on PYTHONPATH and paths relative to OUT, so that a path that a file states is the same for
both. --given: the record of the older checkout, whose run folders and caches this one goes on from; default: its own.
A part that is done is not done again. About 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

STEPS, HALF = 20, 10
MOST_RANKS = 16  # of the resolved configurations
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
MODEL = "ds_dpo://assets/miniature/model"
# The long runs: the miniature as it is shipped, in fp32.
RUN: dict[str, object] = {
    "config": "miniature",
    "deepspeed_config": "zero1_fp32_cpu",
    "max_train_steps": STEPS,
    "schedule.decay_steps": STEPS,
    "cadence.save_every_steps": HALF,
    "cadence.sample_every_steps": "none",
}
# Short runs, one after another in one process, each of which reaches code that the long ones do not.
SHORT: dict[str, object] = {
    **RUN,
    "max_train_steps": 3,
    "data.max_rows": 100,
    "batch.pairs_per_step": 4,
    "batch.micro_batch_pairs": 2,
    "cadence.save_every_steps": 3,
}
# The options without which an objective does not start; the rest are its defaults.
BETA = {"objective.beta": 500}
OBJECTIVES: dict[str, dict[str, object]] = {
    "dpo": BETA,
    "ipo": BETA,
    "hinge": BETA,
    "dmpo": BETA,
    "sdpo": BETA,
    "kto": {**BETA, "objective.undesirable_weight": 0.02},
    "mapo": {},
    "orpo": {},
    "dspo": {**BETA, "objective.shift": 0.05},
    "sft": {},
}
LORA = {"adapter.type": "lora", "adapter.rank": 4, "optimizer.learning_rate": 1e-2}
SHORT_RUNS: dict[str, dict[str, object]] = {
    **{f"objective_{name}": {"objective.type": name, **options} for name, options in OBJECTIVES.items()},
    "automatic_beta": {"objective.target_gradient_factor": 0.3, "objective.gap_decay": 0.8},
    "terms": {"terms.sft_weight": 0.1, "terms.anchor_weight": 0.1, "objective.label_smoothing": 0.1},
    "noising": {
        "diffusion.timestep_sampling": "logit_normal",
        "diffusion.logit_mean": 0,
        "diffusion.logit_std": 1,
        "diffusion.noise_offset": 0.05,
        "diffusion.input_perturbation": 0.1,
        "diffusion.error_weighting": "min_snr",
        "diffusion.snr_gamma": 5,
        "data.flip": "independent",
        "data.prompt_dropout": 0.3,
    },
    "moving_average": {"ema.decay": 0.3},
    "lora": LORA,
    "lora_adapter_reference": {**LORA, "reference.residency": "adapter"},
    "reference_in_host_memory": {"reference.residency": "cpu"},
    "recomputing": {"model.gradient_checkpointing": "true"},
    "held_out": {
        "held_out.every_steps": 1,
        "held_out.split": "validation_unique",
        "held_out.num_pairs": 8,
        "watchdog.max_rise": 2,
    },
    "images": {"cadence.sample_every_steps": 3, "validation.num_inference_steps": 2, "deepspeed_config": "zero2_bf16"},
    "zero2_bf16": {"deepspeed_config": "zero2_bf16"},
    "cached_latents": {"data.cache": "given/cache"},
    "cached_reference": {"reference.residency": "cached", "reference.cache": "given/reference"},
    "old_denoiser_option": {"model.unet_init": MODEL},
    # last: ZeRO-3 replaces torch's linear for the rest of a process
    "zero3": {"deepspeed_config": "zero3_fp32_cpu"},
    "zero3_reference": {"deepspeed_config": "zero3_fp32_cpu", "reference.residency": "zero3"},
}
# Where a name is now, and where it was before the packages.
PLACES = {
    "PairOrder": ("ds_dpo.data.stream.order", "ds_dpo.data.order"),
    "load_config": ("ds_dpo.config.load", "ds_dpo.config"),
    "config_to_yaml": ("ds_dpo.config.load", "ds_dpo.config"),
    "resolve_deepspeed": ("ds_dpo.engine.settings", "ds_dpo.deepspeed_config"),
    "train": ("ds_dpo",),
    "quiet_libraries": ("ds_dpo.process.quiet", "ds_dpo.quiet"),
}
OLD_CONFIG_FILE = f"""base: miniature
output_dir: from_file
deepspeed_config: zero1_fp32_cpu
model: {{unet_init: {MODEL}, gradient_checkpointing: true}}
objective: {{type: kto, beta: 300}}
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A checkout, the folder of its record, and the record that it goes on from."""

    checkout: Path
    out: Path
    given: Path

    def run(self, *command: object, ranks: int = 1) -> None:
        """Run a program of the checkout in the folder. Raises RuntimeError, with its last lines, where it fails."""
        if ranks == 1:
            launcher = [sys.executable]
        else:
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            launcher = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        words = [*launcher, *map(str, command)]
        done = subprocess.run(
            words,
            cwd=self.out,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(self.checkout)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} in {self.out} ended with {done.returncode}:\n{done.stdout[-3000:]}")

    def train(self, name: str, *, ranks: int = 1, **options: object) -> None:
        """Train the run folder `name`. options: of train.py, beside RUN; __ in a name stands for a dot."""
        own = {key.replace("__", "."): value for key, value in options.items()}
        arguments = spell({**RUN, "output_dir": name, "batch.micro_batch_pairs": 8, **own})
        self.run(self.checkout / "ds_dpo" / "train.py", *arguments, ranks=ranks)

    def script(self, name: str, *arguments: object) -> None:
        self.run(self.checkout / "scripts" / name, *arguments)


def curves(side: Side) -> None:
    side.train("1_rank")
    side.train("2_ranks", ranks=2)
    side.train("half", max_train_steps=HALF)
    side.train("half_2_ranks", ranks=2, max_train_steps=HALF)


def exports(side: Side) -> None:
    """Of this checkout's own run, and of the older one's."""
    for name, run in (("export", "1_rank"), ("export_of_given", "given/1_rank")):
        side.script("consolidate.py", run, f"{name}/pipeline", "--format", "pipeline")
        side.script("consolidate.py", run, f"{name}/single_file.safetensors", "--format", "single-file")
        side.script("consolidate.py", run, f"{name}/unet", "--format", "unet", "--dtype", "fp32")


def caches(side: Side) -> None:
    arguments = spell({**SHORT, "output_dir": "unused"})
    side.script("cache.py", *arguments, "--dtype=fp32", "--out=cache")
    side.script("cache.py", *arguments, "--reference", "--out=reference")


def resumed(side: Side) -> None:
    """Go on where the older checkout stopped at half of the steps."""
    for name, ranks in (("half", 1), ("half_2_ranks", 2)):
        shutil.copytree(side.given / name, side.out / "resumed" / name)
        side.train(f"resumed/{name}", ranks=ranks)


def short_runs(side: Side) -> None:
    side.run(__file__, "--inside", "trainings")


def orders(side: Side) -> None:
    side.run(__file__, "--inside", "orders")


def configurations(side: Side) -> None:
    (side.out / "old.yaml").write_text(OLD_CONFIG_FILE)
    side.run(__file__, "--inside", "configurations")


# In this order, as later parts read what earlier ones left.
PARTS: dict[str, Callable[[Side], None]] = {
    "configurations": configurations,
    "orders": orders,
    "curves": curves,
    "exports": exports,
    "caches": caches,
    "short_runs": short_runs,
    "resumed": resumed,
}


def record(side: Side) -> None:
    """Do every part that is not done yet."""
    side.out.mkdir(parents=True, exist_ok=True)
    link = side.out / "given"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(side.given, side.out))
    for name, part in PARTS.items():
        done = side.out / f"{name}.done"
        if not done.exists():
            part(side)
            done.touch()


def spell(options: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# What follows runs inside a checkout.


def found(name: str) -> Any:
    """Return a name of ds_dpo from where this checkout has it."""
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
    os._exit(0)  # the threads of many discarded engines abort an orderly end


def write_orders() -> None:
    """The first places of several sets, with what stands in for an unreadable pair, as one JSON file."""
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
    """Each preset, and an old file, resolved: the run's configuration and DeepSpeed's settings, as data."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", nargs="?")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?")
    parser.add_argument("--given", type=Path, metavar="FOLDER", help="record of the older checkout (default: OUT)")
    parser.add_argument("--inside", choices=list(INSIDE), help="write one part of the record, inside a checkout")
    arguments = parser.parse_args()
    if arguments.inside:
        INSIDE[arguments.inside]()
        return
    if arguments.checkout is None or arguments.out is None:
        parser.error("CHECKOUT and OUT are needed")
    out = arguments.out.resolve()
    record(Side(checkout=arguments.checkout.resolve(), out=out, given=(arguments.given or out).resolve()))


if __name__ == "__main__":
    main()
