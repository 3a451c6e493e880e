"""Run trainings in one launch, and leave beside each run what its first micro-batch held on every rank.

Usage, under `deepspeed`: policy_start_cases.py CASES.json, as train_cases.py takes it; a case ["--move=FROM=TO"]
renames a folder instead. Leaves OUTPUT_DIR/first_RANK.json: pair ids and quantities of the first micro-batch.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import train_cases


def record_first_micro_batches() -> None:
    from ds_dpo.distributed.collectives import rank
    from ds_dpo.training.run_parts import RunParts
    from ds_dpo.training.trainer import Trainer

    before, run = RunParts.before_backward, Trainer.run
    seen: list[dict] = []

    def see(self, batch, quantities) -> None:
        seen.append({"pair_ids": batch.pair_ids.tolist()} | {name: each.tolist() for name, each in quantities.items()})
        before(self, batch, quantities)

    def run_and_save(self) -> bool:
        seen.clear()
        finished = run(self)
        folder = self.checkpoints.store.folder.parent
        path = folder / f"first_{rank()}.json"
        if not path.exists():  # else it is resumed
            path.write_text(json.dumps(seen[0]))
        return finished

    RunParts.before_backward, Trainer.run = see, run_and_save


def move_or_train(arguments) -> None:
    if not arguments[0].startswith("--move="):
        train(arguments)
        return
    _, source, target = arguments[0].split("=")
    if os.environ["RANK"] == "0":
        Path(source).rename(target)
    while not Path(target).exists():  # between two trainings the ranks have no collectives
        time.sleep(0.05)


train = train_cases.train_and_keep_error

if __name__ == "__main__":
    record_first_micro_batches()
    train_cases.train_and_keep_error = move_or_train
    train_cases.main()
