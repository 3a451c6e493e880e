"""Run many small trainings in one launch: a launch costs seconds, an engine tenths of one.

Usage, under `deepspeed` or alone: train_cases.py CASES.json, which holds a list of argument lists for train.py. Each is
one start, as if typed; they run one after another. FAKE_FP16=1 lets DeepSpeed's CPU accelerator accept fp16.
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from ds_dpo import train  # noqa: E402 (the line above finds it)
from ds_dpo.process.quiet import quiet_libraries  # noqa: E402


def let_fp16_reference_take_the_policys_kernels() -> None:
    """Give an fp16 reference weights that require gradients, as the policy's do.

    torch 2.13 computes fp16 on a CPU by other kernels where no weight requires one, so that the preflight would rightly
    refuse; in fp32 and bf16 it makes no difference.
    """
    import torch

    from ds_dpo.models import reference

    freeze = reference.FrozenCopy.__init__

    def freeze_but_in_fp16(self, policy, *, dtype, **others) -> None:
        freeze(self, policy, dtype=dtype, **others)
        self.module.requires_grad_(dtype == torch.float16)

    reference.FrozenCopy.__init__ = freeze_but_in_fp16


def record_sharding() -> None:
    """Let each run leave sharding.json: how many elements of its models rank 0 holds, whole and in parts."""
    from ds_dpo.training.trainer import Trainer

    train_all = Trainer.run

    def train_and_record(self) -> bool:
        is_done = train_all(self)
        if self.record.metrics is not None:
            step = self.optimizer_step
            models = {
                "policy": step.engine.module,
                "reference": getattr(step.preference_step._reference, "module", None),
            }
            found = {name: held_elements(module) for name, module in models.items() if module is not None}
            (self.checkpoints.store.folder.parent / "sharding.json").write_text(json.dumps(found))
        return is_done

    Trainer.run = train_and_record


def held_elements(module) -> dict[str, int]:
    """elements: all ranks' together. whole: of parameters that are not split, or gathered. parts: of this rank's."""
    parameters = list(module.parameters())
    return {
        "elements": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
        "whole": sum(parameter.numel() for parameter in parameters),
        "parts": sum(parameter.ds_tensor.numel() for parameter in parameters if hasattr(parameter, "ds_tensor")),
    }


def train_and_keep_error(arguments) -> None:
    """Train; where that ends since steps were not finite, leave each rank's message in error_RANK.txt."""
    from ds_dpo.distributed.collectives import rank
    from ds_dpo.errors import NonFiniteError

    try:
        train.main(arguments)
    except NonFiniteError as error:
        (folder,) = (text.partition("=")[2] for text in arguments if text.startswith("--output_dir="))
        said = "" if error.is_said_elsewhere else str(error)
        (Path(folder) / f"error_{rank()}.txt").write_text(said)


def main() -> None:
    quiet_libraries()  # before they are imported, as train.py does
    from deepspeed.accelerator import get_accelerator

    if os.environ.get("FAKE_FP16"):
        type(get_accelerator()).is_fp16_supported = lambda self: True
        let_fp16_reference_take_the_policys_kernels()
    record_sharding()
    cases = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    for arguments in json.loads(Path(cases).read_text()):
        train_and_keep_error(arguments)
    sys.stdout.flush()
    os._exit(0)  # the threads of many discarded engines abort an orderly end


if __name__ == "__main__":
    main()
