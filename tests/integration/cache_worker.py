"""Make small caches in processes that are killed; imports and models are loaded once, and each maker is a fork of this.

Usage: cache_worker.py OUT, with the repository on PYTHONPATH. Leaves OUT/report.json: for each trial, after which event
of how many the first maker was killed, and how many images each of the two encoded.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

from ds_dpo.config.load import load_config
from ds_dpo.data.reading.run_pairs import open_trained_on
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.cache import unit as shards_module
from ds_dpo.encoding.cache import write as write_module
from ds_dpo.encoding.cache.fingerprint import fingerprint_of
from ds_dpo.encoding.cache.plan import Request
from ds_dpo.encoding.cache.unit import load_encoders
from ds_dpo.making.make import make

NUM_TRIALS = 10
MAX_ROWS = 22
SHARD_PAIRS = 4
IMAGES_AT_ONCE = 2


class Maker:
    """What every maker shares. Its `make` runs in a fork, and kills itself after so many events."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log = out / "images.log"
        options = ("--deepspeed_config", "zero2_fp32_cpu", "--data.max_rows", str(MAX_ROWS), "--data.flip", "shared")
        self.config = load_config(["--config", "miniature", *options]).config
        self.place = read_environment({})
        self.source = open_trained_on(self.config, say=print, in_file_order=True)
        self.fingerprint = fingerprint_of(self.config, text_dtype="fp32")
        self.encoders: dict[str, object] = {}
        write_module.load_encoders = self.load_once

    def load_once(self, model, **options):
        if "all" not in self.encoders:
            self.encoders["all"] = load_encoders(model, **options)
        return self.encoders["all"]

    def in_fork(self, folder: Path, *, events_until_kill: int | None, workers: int) -> tuple[int, int, bool]:
        """Return how many images a maker encoded, how many events it went through, and whether it was killed."""
        self.log.write_bytes(b"")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self.make(folder, events_until_kill=events_until_kill, workers=workers)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert was_killed or status == 0, f"{folder}: status {status}"
        lines = self.log.read_text().splitlines()
        return lines.count("image"), lines.count("event"), was_killed

    def make(self, folder: Path, *, events_until_kill: int | None, workers: int) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        maker = os.getpid()
        num_events = 0

        def event() -> None:
            nonlocal num_events
            if os.getpid() != maker:
                return
            num_events += 1
            os.write(descriptor, b"event\n")
            if num_events == events_until_kill:
                os.kill(maker, signal.SIGKILL)

        def between_events(function):
            def wrapped(*arguments, **options):
                event()
                result = function(*arguments, **options)
                event()
                return result

            return wrapped

        encode = shards_module.encode_moments

        def counted(vae, pixels, **options):
            result = encode(vae, pixels, **options)
            os.write(descriptor, b"image\n" * (len(pixels) // 2))  # each image is there mirrored too
            return result

        shards_module.encode_moments = between_events(counted)
        for name in ("replace", "fsync", "unlink", "mkdir"):
            setattr(os, name, between_events(getattr(os, name)))
        data = self.config.data.model_copy(update={"workers": workers})
        making = write_module.PairCacheMaking(
            request=Request(
                config=self.config.model_copy(update={"data": data}),
                text_dtype="fp32",
                out=folder,
                quantity="moments",
                dtype="fp32",
                mirrored=True,
                shard_pairs=SHARD_PAIRS,
                images_at_once=IMAGES_AT_ONCE,
            ),
            source=self.source,
            fingerprint=self.fingerprint,
            place=self.place,
            device=torch.device("cpu"),
            say=lambda line: None,
        )
        make(making)


def main(out: Path) -> None:
    maker = Maker(out)
    num_images, num_events, _ = maker.in_fork(out / "whole", events_until_kill=None, workers=0)
    chance = random.Random(int(os.environ.get("CACHE_KILL_SEED", "0")))
    trials = []
    for trial in range(NUM_TRIALS):
        folder, workers = out / f"trial_{trial}", 2 if trial == 0 else 0
        kill_at = chance.randrange(1, num_events + 1)
        killed, _, was_killed = maker.in_fork(folder, events_until_kill=kill_at, workers=workers)
        existed = (folder / "cache.json").exists()
        rerun, _, _ = maker.in_fork(folder, events_until_kill=None, workers=workers)
        trials.append(
            {"kill_at": kill_at, "was_killed": was_killed, "existed": existed, "killed": killed, "rerun": rerun}
        )
    report = {"num_images": num_images, "num_events": num_events, "trials": trials}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
