"""Make small reference caches, in processes that are killed too, and train with them; all in one launch.

Usage: reference_cache_worker.py OUT, with the repository on PYTHONPATH. Leaves OUT/report.json. Models are loaded once,
and each maker is a fork of this process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from ds_dpo import train
from ds_dpo.config.load import load_config
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.feed import build_encode, load_encoders, open_feed
from ds_dpo.errors import DsDpoError
from ds_dpo.making.make import make
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.reference.cache.errors import ReferenceErrors
from ds_dpo.reference.cache.fingerprint import fingerprint_of, start_of_policy
from ds_dpo.reference.cache.record import Coverage
from ds_dpo.reference.cache.write import ReferenceErrorsMaking
from ds_dpo.step.preference_step import squared_errors_of_pairs

NUM_TRIALS = 8
SHARD_PAIRS, BATCH_PAIRS = 4, 3
STEPS, STEPS_OF_TRIALS = 20, 5
# as test_reference_caching.py has them
OPTIONS = [
    *("--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu", "--data.max_rows", "22"),
    *("--pairs_per_step", "4", "--cadence.sample_every_steps", "none"),
    *("--schedule.warmup_steps", "0", "--schedule.decay_steps", "100", "--data.prompt_dropout", "0.2"),
]


class Maker:
    """What every maker shares. Its `make` may run in a fork, and kill itself after so many events."""

    def __init__(self, out: Path) -> None:
        self.log = out / "events.log"
        self.config = load_config([*OPTIONS, "--micro_batch_pairs", "2"]).config
        self.feed = open_feed(self.config, precision="fp32", say=print)
        unet = load_denoiser(self.config.model, dtype=torch.float32)
        attention = choose_attention(unet, "sdpa", device="cpu", dtype=torch.float32)
        set_attention(unet, attention)
        start = start_of_policy(unet, attention)
        self.fingerprint = fingerprint_of(self.config, self.feed, start, precision="fp32")
        encoders = load_encoders(self.config, dtype=torch.float32)
        self.encode = build_encode(self.feed, encoders, model=self.config.model, device=torch.device("cpu"))
        self.unet = unet.requires_grad_(False).eval()
        self.schedule = training_schedule(self.config.model, self.config.diffusion)

    def errors_of(self, samples):
        return squared_errors_of_pairs(self.unet, self.encode(samples), self.schedule, predict=predict_by_unet)

    def make(self, folder: Path, *, steps: int, errors_of=None) -> None:
        sizes = list(self.feed.pairs.bucket_sizes)
        coverage = Coverage.of_run(steps, pairs_per_step=4, bucket_sizes=sizes)
        making = ReferenceErrorsMaking(
            out=folder,
            coverage=coverage,
            seed=self.config.seed,
            pairs=self.feed.pairs,
            shard_pairs=SHARD_PAIRS,
            batch_pairs=BATCH_PAIRS,
            fingerprint=self.fingerprint,
            source_description=self.feed.description,
            device_name="cpu",
            workers=0,
            load=lambda: errors_of or self.errors_of,
            place=read_environment({}),
            say=lambda line: None,
        )
        make(making)

    def in_fork(self, folder: Path, *, events_until_kill: int | None) -> tuple[int, int, bool]:
        """Return how many pairs a maker computed, how many events it went through, and whether it was killed."""
        self.log.write_bytes(b"")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self.make_with_events(folder, events_until_kill=events_until_kill)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert was_killed or status == 0, f"{folder}: status {status}"
        lines = self.log.read_text().splitlines()
        return lines.count("pair"), lines.count("event"), was_killed

    def make_with_events(self, folder: Path, *, events_until_kill: int | None) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        num_events = 0

        def event() -> None:
            nonlocal num_events
            num_events += 1
            os.write(descriptor, b"event\n")
            if num_events == events_until_kill:
                os.kill(os.getpid(), signal.SIGKILL)

        def between_events(function):
            def wrapped(*arguments, **options):
                event()
                result = function(*arguments, **options)
                event()
                return result

            return wrapped

        def counted(samples):
            result = self.errors_of(samples)
            os.write(descriptor, b"pair\n" * len(samples.pair_ids))
            return result

        for name in ("replace", "fsync", "unlink", "mkdir"):
            setattr(os, name, between_events(getattr(os, name)))
        self.make(folder, steps=STEPS_OF_TRIALS, errors_of=between_events(counted))


def run_trials(maker: Maker, out: Path) -> tuple[int, list[dict[str, object]]]:
    num_pairs, num_events, _ = maker.in_fork(out / "whole", events_until_kill=None)
    chance = random.Random(int(os.environ.get("CACHE_KILL_SEED", "0")))
    trials: list[dict[str, object]] = []
    for trial in range(NUM_TRIALS):
        folder, kill_at = out / f"trial_{trial}", chance.randrange(1, num_events + 1)
        killed, _, was_killed = maker.in_fork(folder, events_until_kill=kill_at)
        existed = (folder / "reference.json").exists()
        rerun, _, _ = maker.in_fork(folder, events_until_kill=None)
        trials.append(
            {"kill_at": kill_at, "was_killed": was_killed, "existed": existed, "killed": killed, "rerun": rerun}
        )
    return num_pairs, trials


def compare_with_direct(maker: Maker, folder: Path) -> dict[str, float]:
    """Return the largest differences of what a run reads from errors that are computed alone, pair by pair."""
    errors = ReferenceErrors(folder)
    order = PairOrder(maker.feed.pairs.bucket_sizes, pairs_per_step=4, seed=maker.config.seed)
    largest, places = 0.0, {order.place(position) for position in range(0, STEPS * 4, 3)}
    for index, visit in places:
        chosen, rejected = maker.errors_of(maker.feed.pairs.read(index, visit))
        found = np.array(errors.read(index, visit))
        largest = max(largest, float(np.abs(found / [chosen.item(), rejected.item()] - 1).max()))
    return {"places": len(places), "visits": len({visit for _, visit in places}), "relative_difference": largest}


def alter(folder: Path, altered: Path, *, factor: float) -> None:
    """Leave a copy whose errors are others, as those of another reference would be; its fingerprint says nothing."""
    shutil.copytree(folder, altered)
    (table,) = altered.glob("errors_*.npy")
    rows = np.load(table)
    rows["chosen"] *= factor
    np.save(table, rows)


def message_of(arguments: list[str]) -> str:
    """Return what a training that is refused says."""
    try:
        train.main(arguments)
    except DsDpoError as error:
        return f"{type(error).__name__}: {error}"
    return "it trained"


def main(out: Path) -> None:
    maker = Maker(out)
    num_pairs, trials = run_trials(maker, out)
    shutil.copytree(out / "whole", out / "extended")
    maker.make(out / "extended", steps=STEPS)
    report: dict[str, object] = {"num_pairs": num_pairs, "trials": trials}
    report["direct"] = compare_with_direct(maker, out / "extended")
    alter(out / "extended", out / "altered", factor=1.02)

    def training(name: str, cache: str | None, *changes: str, steps: int = STEPS, micro: int = 2) -> list[str]:
        cached = [] if cache is None else ["--reference.residency", "cached", "--reference.cache", str(out / cache)]
        batch = ["--max_train_steps", str(steps), "--micro_batch_pairs", str(micro)]
        return [*OPTIONS, *batch, "--output_dir", str(out / name), *cached, *changes]

    report["refused"] = {
        "longer": message_of(training("longer", "extended", steps=30)),
        "stale": message_of(training("stale", "extended", "--seed", "1", "--data.flip", "shared")),
        "altered": message_of(training("altered_run", "altered")),
        "pairs": message_of(training("pairs", "missing")),
    }
    train.main(training("replicated", None))
    train.main(training("cached", "extended", micro=1))
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # the threads of many discarded engines abort an orderly end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
