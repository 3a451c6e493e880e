"""Run trainings in one launch, and have each that resumes say what its engine holds before it goes on.

Usage, under `deepspeed` or alone: elastic_cases.py CASES.json, as train_cases.py takes it. A start that resumes from
step N leaves OUTPUT_DIR/resaved/step_N: all that DeepSpeed saves of the live engine, and the moving averages; and
OUTPUT_DIR/resaved/module_N_RANK.pt: the weights that each rank computes with, whole.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from train_cases import main


def save_again_before_going_on() -> None:
    from ds_dpo.training.trainer import Trainer

    run = Trainer.run

    def save_again_and_run(self: Trainer) -> bool:
        step = self.progress.step
        if step:
            folder = self.checkpoints.store.folder.parent / "resaved" / f"step_{step:08d}"
            leave_state(self.optimizer_step.engine, folder)
        return run(self)

    Trainer.run = save_again_and_run


def leave_state(engine, folder: Path) -> None:
    import deepspeed

    folder.mkdir(parents=True, exist_ok=True)
    for file in engine.checkpoint_files(client_state={}):
        file.write(file.state, folder / file.name)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    # each rank computes with weights of its own below stage 3
    torch.save(weights, folder.parent / f"module_{int(folder.name[5:])}_{engine._raw.global_rank}.pt")


if __name__ == "__main__":
    save_again_before_going_on()
    main()
