"""Record what one checkout of this project computes: curves, exports, caches, orders, configurations, as files.

    python benchmarks/behaviour.py CHECKOUT OUT [--given FOLDER]

same_behaviour.py runs this for two checkouts and compares the folders. Every program of CHECKOUT runs in OUT as a child
process, with CHECKOUT first on PYTHONPATH and paths relative to OUT, so that a path in a file is the same for both.
--given: the record of the older checkout, whose run folders and caches this one resumes. A part that is recorded is not
recorded again. Takes about 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from behaviour_runs import HALF, MODEL, RUN, SHORT, SHORT_RUNS
from launching import ENVIRONMENT, free_port, spell  # behaviour_runs puts its folder on the path

INSIDE = Path(__file__).resolve().with_name("behaviour_inside.py")
OLD_CONFIG_FILE = f"""base: miniature
output_dir: from_file
deepspeed_config: zero1_fp32_cpu
model: {{unet_init: {MODEL}, gradient_checkpointing: true}}
objective: {{type: kto, beta: 300}}
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A checkout, the folder of its record, and the record that it resumes from."""

    checkout: Path
    out: Path
    given: Path

    def run(self, *command: object, ranks: int = 1) -> None:
        """Run a program of the checkout in the folder. Raises RuntimeError, with its last lines, if it fails."""
        if ranks == 1:
            launcher = [sys.executable]
        else:
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            launcher = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        words = [*launcher, *map(str, command)]
        done = subprocess.run(
            words,
            cwd=self.out,
            env={**ENVIRONMENT, "PYTHONPATH": str(self.checkout)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} in {self.out} ended with {done.returncode}:\n{done.stdout[-3000:]}")

    def train(self, name: str, *, ranks: int = 1, **options: object) -> None:
        """Train the run folder `name`. options: options of train.py in addition to RUN."""
        arguments = spell({**RUN, "output_dir": name, "batch.micro_batch_pairs": 8, **options})
        self.run(self.checkout / "ds_dpo" / "train.py", *arguments, ranks=ranks)

    def script(self, name: str, *arguments: object) -> None:
        self.run(self.checkout / "scripts" / name, *arguments)


def curves(side: Side) -> None:
    side.train("1_rank")
    side.train("2_ranks", ranks=2)
    side.train("half", max_train_steps=HALF)
    side.train("half_2_ranks", ranks=2, max_train_steps=HALF)


def exports(side: Side) -> None:
    """Export this checkout's run, and the older one's."""
    for name, run in (("export", "1_rank"), ("export_of_given", "given/1_rank")):
        side.script("consolidate.py", run, f"{name}/pipeline", "--format", "pipeline")
        side.script("consolidate.py", run, f"{name}/single_file.safetensors", "--format", "single-file")
        side.script("consolidate.py", run, f"{name}/unet", "--format", "unet", "--dtype", "fp32")


def exports_of_short_runs(side: Side) -> None:
    """Export short runs of the older checkout: its adapter and moving average among them."""
    for name, run, options in (
        ("lora", "lora", ("--format", "lora", "--lora_naming", "kohya")),
        ("merged", "lora", ("--format", "single-file", "--dtype", "bf16")),
        ("cut_out", "objective_dpo", ("--format", "lora", "--rank", "4")),
        ("average", "moving_average", ("--format", "pipeline", "--ema")),
        ("of_zero3", "zero3", ("--format", "unet", "--max_shard_gb", "0.005")),
    ):
        suffix = ".safetensors" if name == "merged" else ""
        side.script("consolidate.py", f"given/short/{run}", f"export_of_short_runs/{name}{suffix}", *options)


def caches(side: Side) -> None:
    arguments = spell({**SHORT, "output_dir": "unused"})
    side.script("cache.py", *arguments, "--dtype=fp32", "--out=cache")
    side.script("cache.py", *arguments, "--reference", "--out=reference")


def resumed(side: Side) -> None:
    """Resume the runs that the older checkout ended at half of the steps."""
    for name, ranks in (("half", 1), ("half_2_ranks", 2)):
        shutil.copytree(side.given / name, side.out / "resumed" / name)
        side.train(f"resumed/{name}", ranks=ranks)


def resumed_by_old_names(side: Side) -> None:
    """Resume a run whose configuration and command line give another start under the older checkout's option."""
    name = "old_denoiser_option"
    shutil.copytree(side.given / "short" / name, side.out / "resumed" / name)
    options = {**SHORT, **SHORT_RUNS[name], "max_train_steps": 6, "output_dir": f"resumed/{name}"}
    side.run(side.checkout / "ds_dpo" / "train.py", *spell(options))


def short_runs(side: Side) -> None:
    side.run(INSIDE, "trainings")


def orders(side: Side) -> None:
    side.run(INSIDE, "orders")


def configurations(side: Side) -> None:
    (side.out / "old.yaml").write_text(OLD_CONFIG_FILE)
    side.run(INSIDE, "configurations")


# In this order, because later parts read the files of earlier ones.
PARTS: dict[str, Callable[[Side], None]] = {
    "configurations": configurations,
    "orders": orders,
    "curves": curves,
    "exports": exports,
    "caches": caches,
    "short_runs": short_runs,
    "resumed": resumed,
    "resumed_by_old_names": resumed_by_old_names,
    "exports_of_short_runs": exports_of_short_runs,
}


def record(side: Side) -> None:
    """Record every part that is not recorded yet."""
    side.out.mkdir(parents=True, exist_ok=True)
    link = side.out / "given"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(side.given, side.out))
    for name, part in PARTS.items():
        done = side.out / f"{name}.done"
        if not done.exists():
            part(side)
            done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="Checkout to record.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Folder of its record.")
    parser.add_argument("--given", type=Path, metavar="FOLDER", help="Record of the older checkout (default: OUT).")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    record(Side(checkout=arguments.checkout.resolve(), out=out, given=(arguments.given or out).resolve()))


if __name__ == "__main__":
    main()
