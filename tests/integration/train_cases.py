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


def let_fp16_reference_take_the_policys_kernels() -> None:
    """Give an fp16 reference weights that require gradients, as the policy's do.

    torch 2.13 computes fp16 on a CPU by other kernels where no weight requires one, so that the preflight would rightly
    refuse; in fp32 and bf16 it makes no difference.
    """
    import torch

    from ds_dpo.models import reference

    freeze = reference.FrozenCopy.__init__

    def freeze_but_in_fp16(self, policy, *, dtype, device) -> None:
        freeze(self, policy, dtype=dtype, device=device)
        self.module.requires_grad_(dtype == torch.float16)

    reference.FrozenCopy.__init__ = freeze_but_in_fp16


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    if os.environ.get("FAKE_FP16"):
        type(get_accelerator()).is_fp16_supported = lambda self: True
        let_fp16_reference_take_the_policys_kernels()
    cases = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    for arguments in json.loads(Path(cases).read_text()):
        train.main(arguments)
    sys.stdout.flush()
    os._exit(0)  # the threads of many discarded engines abort an orderly end


if __name__ == "__main__":
    main()
