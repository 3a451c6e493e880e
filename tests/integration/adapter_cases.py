"""Run trainings in one launch, and leave beside each run what its live policy predicts at the end.

Usage, under `deepspeed` or alone: adapter_cases.py CASES.json, as train_cases.py takes it. Leaves OUTPUT_DIR/live.pt,
the policy's prediction for export_worker.unet_inputs through the engine, and beside it that without its adapter.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from train_cases import main


def predict_after_running() -> None:
    """Let Trainer.run save the predictions once it has ended."""
    from export_worker import unet_inputs

    from ds_dpo.models.denoiser.adapters import adapters_disabled
    from ds_dpo.training.trainer import Trainer

    run = Trainer.run

    def run_and_predict(self: Trainer) -> bool:
        finished = run(self)
        engine = self.optimizer_step.engine
        engine.module.eval()
        inputs = unet_inputs(engine.module.config, engine.module.dtype, seed=0)
        with torch.no_grad():
            found = {"on": engine.policy(**inputs).sample}
            if any(".lora_" in name for name, _ in engine.module.named_parameters()):
                with adapters_disabled(engine.policy):
                    found["off"] = engine.policy(**inputs).sample
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(found, self.checkpoints.store.folder.parent / "live.pt")
        return finished

    Trainer.run = run_and_predict


if __name__ == "__main__":
    predict_after_running()
    main()
