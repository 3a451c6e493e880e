"""The device of this rank: a GPU that works, or the CPU where it is asked for; imports no DeepSpeed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ds_dpo.distributed.half_precision import SLOW, half_precision_cost
from ds_dpo.errors import ConfigError, shown
from ds_dpo.precision import Precision

ACCELERATOR_VARIABLE = "DS_ACCELERATOR"  # DeepSpeed reads it too
ADVICE = (
    "check that nvidia-smi lists the GPUs, that the driver is new enough for this torch, that a container was started "
    "with its GPUs (--gpus all), and CUDA_VISIBLE_DEVICES"
)
BF16_CAPABILITY = (8, 0)  # older GPUs compute bf16 as fp32 and round: correct, but slow


@dataclass(frozen=True, kw_only=True)
class PickedDevice:
    """The device of this rank, and what ranks compare before they start to communicate.

    num_gpus: number of working GPUs that this process sees. words: for the log. gpu_id: that of the hardware, None
    except on a GPU. nccl: its version. capability: the GPU's compute capability.
    """

    device: torch.device
    num_gpus: int
    words: str
    gpu_id: str | None = None
    nccl: str | None = None
    capability: tuple[int, int] | None = None

    def alike(self) -> dict[str, str]:
        """Return what must be the same on all ranks: gloo and NCCL would wait for each other."""
        return {"accelerator": self.device.type, "nccl": self.nccl or "none"}

    def remarks(
        self, *, precision: Precision, cost_on_cpu: Callable[[Precision], float] = half_precision_cost
    ) -> list[str]:
        """Return a line if the device only emulates the precision. cost_on_cpu: measures how slow it is on a CPU."""
        if self.device.type == "cpu" and precision != "fp32" and (cost := cost_on_cpu(precision)) > SLOW:
            return [
                f"warning: this CPU takes {cost:.0f} times as long in {precision} as in fp32; zero1_fp32_cpu, "
                "zero2_fp32_cpu or zero3_fp32_cpu as deepspeed_config trains in fp32"
            ]
        if precision != "bf16" or self.capability is None or self.capability >= BF16_CAPABILITY:
            return []
        major, minor = self.capability
        return [
            f"warning: bf16 on a GPU of compute capability {major}.{minor}, which emulates it slowly; from 8.0 on GPUs "
            "compute it: take zero2_fp16 or zero3_fp16 as deepspeed_config"
        ]


def pick_device(local_rank: int, environ: Mapping[str, str], *, needs_gpu: bool = True) -> PickedDevice:
    """Return this rank's device, after a computation on it.

    environ: with DS_ACCELERATOR=cpu the CPU. Without the variable it is a GPU. needs_gpu: if False, a program that may
    go on without a GPU takes the CPU. Raises ConfigError, on this rank alone, if no GPU works here.
    """
    asked = environ.get(ACCELERATOR_VARIABLE) or None
    if asked == "cpu":
        return PickedDevice(device=torch.device("cpu"), num_gpus=0, words=f"cpu ({ACCELERATOR_VARIABLE}=cpu)")
    if asked not in (None, "cuda"):
        device = _other_accelerator(asked, local_rank)
        return PickedDevice(device=device, num_gpus=0, words=f"{device} ({ACCELERATOR_VARIABLE}={asked})")
    num_gpus, problem = _working_gpus()
    if num_gpus:
        return _gpu(gpu_index(local_rank, num_gpus, environ), num_gpus)
    if not needs_gpu and asked is None:
        return PickedDevice(device=torch.device("cpu"), num_gpus=0, words=f"cpu ({problem})")
    raise _on_this_rank(
        f"no GPU works here ({problem}): {ADVICE}; to compute on the CPU, set {ACCELERATOR_VARIABLE}=cpu"
    )


def _other_accelerator(asked: str, local_rank: int) -> torch.device:
    """Return the device of another kind of accelerator; raises ConfigError, on this rank alone, if torch has none."""
    try:
        device = torch.device(asked, local_rank)
    except (RuntimeError, ValueError):
        device = None
    kind = None if device is None else getattr(torch, device.type, None)
    if device is None or kind is None or not kind.is_available():
        raise _on_this_rank(
            f"{ACCELERATOR_VARIABLE}={shown(asked)} is no accelerator that torch {torch.__version__} finds here; cpu "
            "or cuda would fit, in lower case, and without the variable a GPU is taken"
        )
    return device


def gpu_index(local_rank: int, num_gpus: int, environ: Mapping[str, str]) -> int:
    """Return the index of this rank's GPU among those that it sees: 0 where a scheduler shows each rank its own.

    Raises ConfigError, on this rank alone, if there are several GPUs and none for this rank.
    """
    if local_rank < num_gpus:
        return local_rank
    if num_gpus == 1:
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES", "not set")
    raise _on_this_rank(
        f"rank {local_rank} of this host has no GPU of its own: it sees {num_gpus} (CUDA_VISIBLE_DEVICES {visible}); "
        "start no more ranks on a host than it has GPUs, or let the scheduler show each rank one GPU"
    )


def _working_gpus() -> tuple[int, str]:
    """Return the number of GPUs that torch can use, and why there are none."""
    with warnings.catch_warnings(record=True) as caught:  # torch says there why a driver does not fit
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.version.cuda is None and torch.version.hip is None:
        return num_gpus, f"torch {torch.__version__} is built for CPUs"
    reasons = [str(warning.message).split(" (Triggered")[0].strip() for warning in caught]
    return num_gpus, "; ".join(["torch.cuda.is_available() is False", *reasons])


def _gpu(index: int, num_gpus: int) -> PickedDevice:
    device = torch.device("cuda", index)
    try:
        # a GPU that is counted may still refuse to work
        torch.ones(1, device=device).item()
        facts = torch.cuda.get_device_properties(device)
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise _on_this_rank(f"GPU {index} of {num_gpus} does not work ({first_line}): {ADVICE}") from error
    capability = (facts.major, facts.minor) if torch.version.hip is None else None
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    words = [
        f"{device} of {num_gpus}",
        facts.name,
        *([] if capability is None else [f"compute capability {capability[0]}.{capability[1]}"]),
        f"{facts.total_memory / 2**30:.1f} GiB",
        f"torch for CUDA {torch.version.cuda}" if torch.version.hip is None else f"torch for ROCm {torch.version.hip}",
        f"NCCL {nccl}",
    ]
    gpu_id = getattr(facts, "uuid", None)
    return PickedDevice(
        device=device,
        num_gpus=num_gpus,
        words=", ".join(words),
        gpu_id=None if gpu_id is None else str(gpu_id),
        nccl=nccl,
        capability=capability,
    )


def _on_this_rank(message: str) -> ConfigError:
    """Return an error that each rank prints that has it: other hosts may be well."""
    error = ConfigError(message)
    error.same_on_all_ranks = False
    return error
